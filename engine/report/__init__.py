"""report.html and summary.json. Reads files only.

build.py        makes both
data.py         what a report shows, the columns of its cost tables (COST_ITEMS); summary.json
collect.py      reads a run directory into it
reader.py       reads files that may be missing or damaged
stages.py       what config and manifests say of cost and learning curve
spending.py     what was spent, by purpose and model state
baseline.py     other runs to compare with
net.py          the net saving
evaluation.py   facts, wording, calibration
metadata.py     known and unknown by the pool's columns
chart.py        the style of all charts
figures.py      the report's charts
net_figures.py  the net saving's charts
page.py         pages that open offline
"""
