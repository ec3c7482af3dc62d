"""``ka2l benchmark``: models x data sets x strategies x seeds, side by side. One such run is a cell.

matrix.py        MatrixConfig and its cells
sizes.py         GPUs of each cell
runner.py        starts cells, watches them, starts them again
cell_process.py  the process of a cell
cell_imports.py  what that process has imported when it begins
collect.py       reads results
agreement.py     do models know the same questions?
data.py          benchmark.json
figures.py       charts
report.py        benchmark.html
"""
