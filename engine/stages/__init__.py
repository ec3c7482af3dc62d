"""One function a stage: committed tables in, one committed table out. ``engine/loop.py`` calls them in order."""

from engine.stages.augmenting import augment, difficulty, facts
from engine.stages.choosing import annotate, select
from engine.stages.decoding import decode
from engine.stages.evaluating import evaluate
from engine.stages.fitting import check_tables, corpus, fit_decoder
from engine.stages.knowing import feedback, knowledge, label, probe
from engine.stages.observing import cluster, extract, observe, perplexity
from engine.stages.pool import check_budget, pool
from engine.stages.tuning import compare, tune

__all__ = [
    "annotate",
    "augment",
    "check_budget",
    "check_tables",
    "cluster",
    "compare",
    "corpus",
    "decode",
    "difficulty",
    "evaluate",
    "extract",
    "facts",
    "feedback",
    "fit_decoder",
    "knowledge",
    "label",
    "observe",
    "perplexity",
    "pool",
    "probe",
    "select",
    "tune",
]
