"""The testbed: a small closed-book language model whose knowledge is known exactly.

A world of facts (``testbed_world``), a Llama of about two million parameters pre-trained on part of it, a question
pool over it and, apart from the pool, the truth about what was shown how often. It is the model of the quickstart and
of the tests, and the ground truth of the benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ka2l.errors import PoolError
from ka2l.section import Section
from ka2l.testbed.facts import read_facts
from ka2l.testbed.lives import invent_lives
from ka2l.testbed.model import train_model
from ka2l.testbed.world import World, answer_rows, invent_facts, pool_rows, training_rows, truth_rows

#: Raise it when a change gives another world or model for the same config: cached testbeds are then built anew.
BUILDER_VERSION = 3

#: Distinct questions written to background.jsonl at most.
MAX_BACKGROUND = 20_000

_ANSWERS = pa.schema([("question", pa.string()), ("answers", pa.list_(pa.string())), ("fact", pa.string())])


#: Testbeds that come with the package, one folder each: those of the presets ``quickstart`` and ``knowtuning``.
SHIPPED = Path(__file__).with_name("weights")


class TestbedConfig(Section):
    """What the testbed's world looks like and how its model is trained."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    seed: int = 0
    """Seed of the world, of the order of the training rows and of the model's weights."""
    num_people: int = Field(300, ge=1)
    """People whose facts are candidates and are evaluated, five facts each."""
    num_seed_people: int = Field(80, ge=1)
    """People whose facts are seed questions for the probe: the same mixture, other people."""
    stranger_share: float = Field(0.35, ge=0, le=1)
    """Share of the people never shown."""
    partly_share: float = Field(0.30, ge=0, le=1)
    """Share of the people shown a little. The others are shown often."""
    partly_exposures: tuple[int, int] = (1, 6)
    """How often a fact of a partly known person is shown: drawn between these two, both included."""
    background_share: float = Field(1 / 3, ge=0, lt=1)
    """Share of training rows about people never asked about, with random answers: doubt has to be learnt."""
    wrong_share: float = Field(0.0, ge=0, le=1)
    """Share of the well-known facts that are learnt wrongly: always shown with one wrong answer."""
    wrong_relations: tuple[str, ...] | None = None
    """Relations of which that share is taken, e.g. [employer]; None: of all. Mistakes of few relations come in
    clusters, as those from one bad source do."""
    outside_share: float = Field(0.0, ge=0, lt=1)
    """Share of the candidate facts that are left out of the pool but for their evaluation question: only decoded
    questions can ask for them."""
    num_steps: int | None = Field(None, ge=1)
    """Training steps. None: one for every five facts, 400 at least."""
    batch_size: int = Field(128, ge=1)
    """Rows a training step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the one-cycle schedule for embeddings and norms (AdamW)."""
    matrix_learning_rate: float = Field(0.02, gt=0)
    """Peak of the one-cycle schedule for the layers' matrices (Muon)."""
    hidden_size: int = Field(192, ge=32)
    """Width of the model; a multiple of head_size."""
    intermediate_size: int = Field(512, ge=32)
    """Width of the feed-forward layers."""
    head_size: int = Field(64, ge=32)
    """Width of an attention head; vLLM on a CPU wants a multiple of 32."""
    num_layers: int = Field(4, ge=1)
    """Transformer layers; there is one hidden state more, the embeddings."""
    vocab_size: int = Field(8192, ge=512)
    """Size of the tokenizer at most. Invented people need about 1,800 and no more are used."""
    lives: bool = False
    """Ask for whole lives: one question a person, answered in five sentences (`ka2l.testbed.lives`)."""
    disorder_share: float = Field(0.4, ge=0, le=1)
    """Share of the lives that training always shows in an order of their own."""
    facts: str | None = None
    """A JSONL file of {question, answers, [subject]} rows to build the world from instead of invented people."""
    exposure: str | None = None
    """The facts file's column that says how well known a fact is, e.g. popularity. Without it a seeded hash decides."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stranger_share + self.partly_share > 1:
            raise ValueError("stranger_share and partly_share add up to more than 1")
        if not 0 < self.partly_exposures[0] <= self.partly_exposures[1]:
            raise ValueError("partly_exposures must be two counts, at least 1, the smaller one first")
        if self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_size {self.head_size}")
        if self.lives and (self.facts or self.wrong_share):
            raise ValueError("lives are of invented people and learnt as they are: leave facts and wrong_share out")
        if self.exposure and not self.facts:
            raise ValueError("exposure names a column of the facts file: give facts too")
        return self


class Testbed(NamedTuple):
    """Where a finished testbed lies."""

    directory: Path
    model: Path
    """A Hugging Face model directory."""
    pool: Path
    """pool.jsonl: {id, question, answers, split, group, fact, relation}."""
    truth: Path
    """truth.jsonl: {fact, exposure_group, num_exposures, [wrong_answer]}. Not for the loop: it is the ground truth."""


Testbed.__test__ = False  # type: ignore[attr-defined]  # nor is this one


def fingerprint(config: TestbedConfig) -> str:
    """Hash of all that decides what a testbed is: config, builder version and the bytes of the facts file.

    Raises:
        PoolError: the facts file cannot be read.
    """
    values = config.model_dump(mode="json", exclude={"facts"})
    digest = hashlib.sha256(json.dumps([BUILDER_VERSION, values], sort_keys=True).encode())
    if config.facts:
        try:
            digest.update(Path(config.facts).read_bytes())
        except OSError as error:
            raise PoolError(f"cannot read the facts file {config.facts}: {error.strerror}") from error
    return digest.hexdigest()


def shipped_testbed(config: TestbedConfig) -> Testbed | None:
    """The testbed of this config, if it is one of those that come with the package."""
    mark = fingerprint(config)
    for description in sorted(SHIPPED.glob("*/testbed.json")):
        if json.loads(description.read_text(encoding="utf-8"))["fingerprint"] == mark:
            return _testbed_at(description.parent)
    return None


def cached_testbed_at(config: TestbedConfig, cache_dir: Path) -> Testbed:
    """Where the testbed of this config lies, in the package or in ``cache_dir``, or would lie; builds nothing."""
    return shipped_testbed(config) or _testbed_at(Path(cache_dir) / f"testbed-{fingerprint(config)[:16]}")


def cached_testbed(
    config: TestbedConfig, cache_dir: Path, progress: Callable[[int, int], None] | None = None
) -> Testbed:
    """The testbed of this config, shipped or in ``cache_dir``; built there if it is neither. Only one process builds at
    a time."""
    from filelock import FileLock

    found = cached_testbed_at(config, cache_dir)
    if (found.directory / "testbed.json").is_file():
        return found
    directory = found.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if not (directory / "testbed.json").is_file():
            build_testbed(config, directory, progress)
    return found


def build_testbed(
    config: TestbedConfig, directory: Path, progress: Callable[[int, int], None] | None = None
) -> Testbed:
    """Builds world, model and pool into ``directory``, which appears only when all is done.

    Args:
        config: what to build; the same config gives the same data files byte for byte.
        directory: the result; one that exists is replaced.
        progress: called with (steps done, steps in all) after each training step.

    Raises:
        PoolError: the facts file is missing or holds no usable row, or no row has the exposure column.
    """
    mark = fingerprint(config)
    world = build_world(config)
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_jsonl(target / "pool.jsonl", pool_rows(world.facts, config.seed, config.outside_share))
        pq.write_table(pa.Table.from_pylist(list(answer_rows(world)), schema=_ANSWERS), target / "answers.parquet")
        _write_jsonl(target / "truth.jsonl", truth_rows(world.facts))
        _write_jsonl(target / "background.jsonl", _background_rows(world, config))
        rows = list(training_rows(world, config))
        summary = train_model(rows, world.facts, config, target / "model", progress)
        _write_json(target / "testbed.json", _description(config, mark, world, summary))
        target.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        target.rename(directory)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return _testbed_at(directory)


def _testbed_at(directory: Path) -> Testbed:
    return Testbed(directory, directory / "model", directory / "pool.jsonl", directory / "truth.jsonl")


def build_world(config: TestbedConfig) -> World:
    """The world of a config: facts or lives of invented people, or the questions of ``config.facts``.

    Raises:
        PoolError: the facts file is missing or holds no usable row, or no row has the exposure column.
    """
    if config.lives:
        return invent_lives(config)
    return read_facts(config) if config.facts else invent_facts(config)


def _description(config: TestbedConfig, mark: str, world: World, summary: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for fact in world.facts:
        counts[fact.exposure_group] = counts.get(fact.exposure_group, 0) + 1
    return {
        "fingerprint": mark,
        "builder_version": BUILDER_VERSION,
        "config": config.model_dump(mode="json"),
        "num_facts": len(world.facts),
        "num_facts_by_exposure": counts,
        "num_skipped_rows": world.num_skipped,
        **summary,
    }


def _background_rows(world: World, config: TestbedConfig) -> Iterator[dict[str, str]]:
    rng = random.Random(f"{config.seed}:background")
    num_wanted = min(MAX_BACKGROUND, 10 * len(world.facts))
    for question in dict.fromkeys(world.background(rng)[0] for _ in range(num_wanted)):
        yield {"question": question}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
