"""Makes KnowTuning's training sets: facts of annotated answers, the hardest of them, better and worse answers."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engine import build
from engine.annotation import annotators
from engine.execution.jobs import ShardInput
from engine.execution.shard_run import run_host
from engine.stages.choosing import annotation_context, asking_room, batch_size, teacher_fields, teacher_workers
from engine.stages.kind import Outcome, Work, declare, replicas
from engine.stages.tables import adapter_input, among, by_id, num_rows
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.schemas import FACTS, PAIRS
from ka2l.tuning.knowledge_writer import KnowledgeWriter
from ka2l.tuning.knowtuning import KnownFacts, count_refusals, extract_facts
from ka2l.tuning.knowtuning import augment as augment_answers

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

Row = Mapping[str, Any]
#: From a batch of rows to what is made of them, and (question id, part, reason) of what could not be made.
Make = Callable[[KnowledgeWriter, Sequence[Row]], tuple[list[dict[str, Any]], list[tuple[str, str, str]]]]


@declare(
    "tuning",
    room=lambda config: asking_room(config, local=config.tuning.knowtuning.writer == "local_teacher"),
    needed=lambda config, round_index: config.tuning.augments,
)
def facts(campaign: Campaign, round_index: int) -> Work:
    """Take the round's annotated answers apart into atomic facts."""
    annotated = campaign.stage("annotate", round_index)

    def make(writer: KnowledgeWriter, rows: Sequence[Row]) -> Any:
        answers = {row["question_id"]: (row["question"], row["answers"][0]) for row in rows}
        found, refused = extract_facts(answers, writer)
        made = [
            {"question_id": name, "question": answers[name][0], "answer": answers[name][1], "facts": listed}
            for name, listed in found.items()
        ]
        return made, [(name, "facts", reason) for name, reason in refused.items()]

    def work(stage: Stage) -> Outcome:
        rows = annotated.table(["question_id", "question", "answers"]).sort_by("question_id").to_pylist()
        return _write(campaign, stage, rows, make, FACTS), {}

    return Work(_writer_fields(campaign), [annotated], work)


@declare(
    "tuning",
    room=lambda config: replicas(config.extraction),
    needed=lambda config, round_index: config.tuning.augments,
)
def difficulty(campaign: Campaign, round_index: int) -> Work:
    """Perplexity of every fact under this round's model state: one forward pass."""
    config = campaign.config
    extracted = campaign.stage("facts", round_index)
    given_question = config.tuning.knowtuning.perplexity_given == "question"
    state = campaign.state(round_index)

    def work(stage: Stage) -> Outcome:
        make_host = partial(
            build.perplexity_host, state.model, config.prompt, config.extraction, state.adapter, given_question
        )
        run_host(
            campaign,
            stage,
            make_host,
            {"questions": ShardInput(extracted.url, ["question_id", "question", "facts"])},
            replicas=config.extraction.replicas,
            cpus=config.extraction.cpus_per_replica,
            gpus=config.extraction.gpus_per_replica,
            over=extracted,
        )
        return {"num_questions": num_rows(stage)}, {}

    fields: dict[str, Any] = {"perplexity_given": config.tuning.knowtuning.perplexity_given}
    if given_question:
        fields["prompt"] = config.prompt.result_fields()
    return Work(fields, [extracted, *adapter_input(campaign, round_index)], work)


@declare(
    "tuning",
    room=lambda config: asking_room(config, local=config.tuning.knowtuning.writer == "local_teacher"),
    needed=lambda config, round_index: config.tuning.augments,
)
def augment(campaign: Campaign, round_index: int) -> Work:
    """Questions for the hardest facts, and a better and worse answers to each question."""
    config = campaign.config
    extracted, measured = campaign.stage("facts", round_index), campaign.stage("difficulty", round_index)

    def make(writer: KnowledgeWriter, rows: Sequence[Row]) -> Any:
        answers = [KnownFacts(**row) for row in rows]
        made = augment_answers(answers, config.tuning.knowtuning, writer, config.seed)
        return [pair._asdict() for pair in made.pairs], made.refusals

    def work(stage: Stage) -> Outcome:
        # A question that could not be measured has failed there, and is counted there.
        perplexities = by_id(measured.table(), "perplexities")
        rows = extracted.table(None, among(perplexities)).sort_by("question_id").to_pylist()
        rows = [row | {"perplexities": perplexities[row["question_id"]]} for row in rows]
        metrics = _write(campaign, stage, rows, make, PAIRS)
        parts: Counter[str] = Counter()
        for name in stage.finished_shards():
            parts.update(read_shard(stage.url, name, ["part"])["part"].to_pylist())
        return metrics | {"num_pairs": dict(sorted(parts.items()))}, {}

    knowtuning = config.tuning.knowtuning.result_fields()
    made_by = ("augment", "hard_share", "aspects", "delete_share")
    return Work(_writer_fields(campaign) | {name: knowtuning[name] for name in made_by}, [extracted, measured], work)


def _writer_fields(campaign: Campaign) -> dict[str, Any]:
    """What changes a writer's work."""
    kind = campaign.config.tuning.knowtuning.writer
    if kind == "testbed":
        return {"writer": kind, "testbed": campaign.config.testbed.result_fields()}
    annotator = campaign.config.annotator.model_copy(update={"kind": kind})
    return {"writer": kind, "annotator": teacher_fields(annotator)}


@contextlib.contextmanager
def _writer(campaign: Campaign, stage: Stage) -> Iterator[KnowledgeWriter]:
    assert stage.round_index is not None
    local = campaign.config.tuning.knowtuning.writer == "local_teacher"
    with contextlib.ExitStack() as ended:
        placement = ended.enter_context(teacher_workers(campaign, local=local))
        writer = annotators.knowledge_writer(
            campaign.config, annotation_context(campaign, stage.round_index, {}, placement)
        )
        ended.callback(writer.close)
        yield writer


def _write(campaign: Campaign, stage: Stage, rows: Sequence[Row], make: Make, schema: pa.Schema) -> dict[str, Any]:
    """Make a stage's table of rows, batch by batch; a batch that is written is never made again. What could not be made
    is kept with its reason in a file beside each batch."""
    finished = stage.finished_shards()
    stopped = None
    names = []
    with _writer(campaign, stage) as writer, campaign.events.progress(stage.label, len(rows), "answers") as progress:
        size = batch_size(stage, min(writer.batch_size, max(1, len(rows))))
        for index, start in enumerate(range(0, max(1, len(rows)), size)):
            name, batch = shard_name(index), rows[start : start + size]
            names.append(name)
            if name not in finished:
                before = _cost(writer)
                made, refusals = make(writer, batch)
                cost = {item: total - before[item] for item, total in _cost(writer).items()}
                stage.write_file(_refusals_of(name), json.dumps(refusals).encode())
                write_shard(stage.url, name, pa.Table.from_pylist(made, schema=schema), cost)
                campaign.note_shard(stage, name, len(made), cost)
                stopped = writer.stopped
            progress.advance(len(batch))
            if stopped:
                break
    kept = [campaign.run.read_bytes(f"{stage.path}/{_refusals_of(name)}") or b"[]" for name in names]
    refused = [(name, part, reason) for content in kept for name, part, reason in json.loads(content)]
    counts = {"num_answers": len(rows), "num_rows": num_rows(stage), "num_refused": len(refused)}
    return counts | {"refused": count_refusals(refused), "stopped": stopped}


def _refusals_of(shard: str) -> str:
    return shard.replace("part-", "refused-").replace(".parquet", ".json")


def _cost(writer: KnowledgeWriter) -> dict[str, float]:
    """What a writer's calls have taken so far; nothing of one that costs nothing."""
    return {} if writer.usage is None else writer.usage.cost_items()
