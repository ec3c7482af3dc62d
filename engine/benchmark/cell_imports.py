"""Imports the libraries of a run's driver in the process that cells are forked from.

All but Ray: it draws the names of workers and objects from a generator of random numbers that it seeds when it is first
used, and cells that had it in common would get the same names.
"""

from __future__ import annotations

import gc
import importlib

for _name in (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
    "sklearn.linear_model",
    "pyarrow.parquet",
    "plotly.offline",
    "jinja2",
    "engine.config",
):
    importlib.import_module(_name)
# A collection writes into every object that it looks at, and what is written to is not shared any more.
gc.collect()
gc.freeze()
