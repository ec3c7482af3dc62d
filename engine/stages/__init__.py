"""The stages of a run, in the order of the loop.

Each module declares its stages with `kind.declare`; the tuples below are all that says their order.

kind.py        the declaration of a stage
tables.py      what several stages read and write
pool.py        pool: questions and references
observing.py   observe, cluster, extract, perplexity
knowing.py     label, probe, feedback, knowledge
judging.py     the second axis of knowledge: sure and wrong
evaluating.py  evaluate: wording, facts, calibration
choosing.py    select, annotate
fitting.py     corpus, corpus_states, decoder
decoding.py    decode
augmenting.py  facts, difficulty, augment: KnowTuning's training sets
tuning.py      tune, compare
"""

from engine.config import RunConfig
from engine.stages.augmenting import augment, difficulty, facts
from engine.stages.choosing import annotate, select
from engine.stages.decoding import decode
from engine.stages.evaluating import evaluate
from engine.stages.fitting import corpus, corpus_states, decoder
from engine.stages.kind import PURPOSES, Purpose, Room, StageKind
from engine.stages.knowing import feedback, knowledge, label, probe
from engine.stages.observing import cluster, extract, observe, perplexity
from engine.stages.pool import pool
from engine.stages.tuning import compare, tune

#: Made once, before the first round.
POOL: tuple[StageKind, ...] = (
    pool,  # questions for everybody, references for annotator and grading alone
    corpus,  # further questions for a decoder to be fitted on
)
#: What does the round's model state know? It is the base model with the adapter tuned so far.
KNOW: tuple[StageKind, ...] = (
    observe,  # sample answers
    cluster,  # group them by meaning: semantic entropy; accuracy on eval
    label,  # dynamic threshold: known or unknown, for the seed questions
    extract,  # one forward pass a question: hidden states
    probe,  # classifier on the seed questions' states
    feedback,  # how sure is the base model of its own samples, and was it right where answers are annotated?
    knowledge,  # P(unknown) of every question: the knowledge map
    evaluate,  # facts, wording, calibration: figures beside accuracy
)
#: Which questions are worth an annotation, and what are their answers?
ASK: tuple[StageKind, ...] = (
    perplexity,  # how hard each candidate's wording is; for the strategy of that name
    select,  # query strategy
    corpus_states,  # states of the decoder's corpus, where a decoder is fitted
    decoder,  # fitted where tuning has moved the states
    decode,  # unknown states to new questions, through the gates
    annotate,  # answers for what was selected and decoded: the only stage that costs annotation
)
#: The next model state.
LEARN: tuple[StageKind, ...] = (
    facts,  # KnowTuning: atomic facts of each annotated answer
    difficulty,  # KnowTuning: perplexity of each under the current model
    augment,  # KnowTuning: questions for the hardest; better and worse answers
    tune,  # LoRA on answers and on the model's own answers to the rest
    compare,  # KnowTuning: DPO from the tuned adapter on
)


def round_stages() -> tuple[StageKind, ...]:
    """The stages of a round, in their order."""
    return (*KNOW, *ASK, *LEARN)


def pool_folders() -> list[str]:
    """Folders of the stages that are made once, in their order."""
    return [name for kind in POOL for name in kind.folders]


def round_folders() -> list[str]:
    """Folders of a round's stages, in their order."""
    return [name for kind in round_stages() for name in kind.folders]


def stage_kind(folder: str) -> StageKind | None:
    """The stage that commits a folder of this name; None where no stage of this version does."""
    return next((kind for kind in (*POOL, *round_stages()) if folder in kind.folders), None)


def room_of(folder: str, config: RunConfig | None) -> Room:
    """What the workers of a stage hold; one CPU where the stage or the config is not known."""
    kind = stage_kind(folder)
    return Room(1.0, 0.0) if kind is None or config is None else kind.room(config)


def folders_by_purpose() -> dict[Purpose, list[str]]:
    """Folders of all stages by what their cost is booked as, in the order of the report."""
    found: dict[Purpose, list[str]] = {purpose: [] for purpose in PURPOSES}
    for kind in (*POOL, *round_stages()):
        found[kind.purpose] += kind.folders
    return found
