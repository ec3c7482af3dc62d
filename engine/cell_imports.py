"""What the driver of a run imports, for the process that cells are forked from: it has all of it when they begin."""

from __future__ import annotations

import gc
import importlib

for _name in (
    "torch",
    "transformers",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "sklearn.linear_model",
    "ray.data",
    "ray.train.torch",
    "plotly.offline",
    "jinja2",
    "engine.loop",
    "engine.benchmark",
):
    importlib.import_module(_name)
# A collection writes into every object that it looks at, and what is written to is not shared any more.
gc.collect()
gc.freeze()
