"""Selects questions and annotates them."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.workers.placement import Placement
from engine import build
from engine.annotation import annotators
from engine.annotation.context import AnnotationContext
from engine.execution.sharing import shared_teacher
from engine.stages.kind import Outcome, Room, Work, declare, one_cpu, replicas
from engine.stages.tables import among, asked_ids, by_id, kept_questions, make_table, num_rows, states_of
from engine.store.shards import read_shard, shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.annotation.annotator import Annotator, AnnotatorConfig
from ka2l.annotation.people import Task
from ka2l.model.loading import model_name
from ka2l.pool.sources import content_identity
from ka2l.schemas import ANNOTATIONS, SELECTION
from ka2l.section import is_plugin
from ka2l.seeds import row_seed
from ka2l.selection.strategies import Candidates, Shortlist, explored_share
from ka2l.selection.strategies import select as select_candidates

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.execution.campaign import Campaign

#: selection.kind -> the stage and column that hold what candidates are ranked by, and its name in Candidates.
_MEASURED = {
    "semantic_entropy": ("cluster", "semantic_entropy", "entropy"),
    "entropy": ("cluster", "predictive_entropy", "predictive_entropy"),
    "perplexity": ("perplexity", "perplexity", "perplexity"),
}


@declare("probing")
def select(campaign: Campaign, round_index: int) -> Work:
    """Choose the questions to annotate by the query strategy."""
    config = campaign.config
    known = campaign.stage("knowledge", round_index)
    stages = ("select", "decode") if config.decoder.kind != "none" else ("select",)
    chosen_before = [campaign.stage(name, index) for index in range(round_index) for name in stages]
    observed, extracted = campaign.stage("cluster", round_index), campaign.stage("extract", round_index)
    kind = config.selection.kind
    measured = [campaign.stage("perplexity", round_index)] if kind == "perplexity" else []
    budget = campaign.num_left(round_index)

    def work(stage: Stage) -> Outcome:
        # Whatever was asked before is not asked again, even where the annotator refused it.
        taken = pa.array([name for index in range(round_index) for name in asked_ids(campaign, index)], pa.string())
        wanted = config.selection.model_copy(update={"budget": budget})
        seed = row_seed(config.seed, round_index, "select", "")
        shortlist = Shortlist(wanted, seed)
        for name in known.shard_names():
            shortlist.add(_candidates(campaign, round_index, name, taken))
        candidates = shortlist.candidates()
        if kind in ("probe_diverse", *config.selection.COMPARED) or is_plugin(kind):
            states = _chosen_states(campaign, extracted, round_index, candidates.question_ids)
            asked = _asked_states(campaign, extracted, round_index, taken) if len(taken) else None
            candidates = candidates._replace(states=states, asked_states=asked)
        num_left = campaign.config.annotation_cap - campaign.num_annotated(round_index)
        explore = explored_share(wanted, num_left, shortlist.num_likely)
        # What the last round explores, no later round can use; and without own answers nothing shows what was wrong.
        if round_index == config.rounds - 1 or config.tuning.rehearsal == 0:
            explore = 0.0
        wanted = wanted.model_copy(update={"budget": min(budget, shortlist.num_seen), "explore": explore})
        chosen = select_candidates(candidates, wanted, seed, build.strategy(config.selection))
        columns = {
            "question_id": [candidates.question_ids[index] for index in chosen.indices],
            "rank": np.arange(len(chosen.indices)),
            "score": chosen.scores,
            "strategy": [kind] * len(chosen.indices),
        }
        write_shard(stage.url, shard_name(0), make_table(columns, SELECTION), {})
        counts = {"num_selected": len(chosen.indices), "num_candidates": shortlist.num_seen}
        if kind in config.selection.COMPARED:  # of a large pool a uniform draw
            counts["num_compared"] = len(candidates.question_ids)
        return {"strategy": kind} | counts, {}

    fields = config.selection.result_fields() | {"budget": budget}
    return Work(fields, [known, *chosen_before, observed, extracted, *measured], work)


def _candidates(campaign: Campaign, round_index: int, shard: str, taken: pa.Array) -> Candidates:
    """The candidates of one shard that have not been asked yet."""
    known = campaign.stage("knowledge", round_index)
    table = read_shard(known.url, shard, ["question_id", "split", "score", "p_unknown", "p_wrong"])
    asked = pc.is_in(table["question_id"], value_set=taken)
    table = table.filter(pc.and_(pc.equal(table["split"], "candidate"), pc.invert(asked)))
    measured: dict[str, np.ndarray] = {}
    if campaign.config.selection.kind in _MEASURED:
        stage, column, name = _MEASURED[campaign.config.selection.kind]
        where = pc.field("purpose") == "probe" if stage == "cluster" else None
        drawn = read_shard(campaign.stage(stage, round_index).url, shard, ["question_id", column], where)
        found = by_id(drawn.filter(pc.is_finite(drawn[column])), column)
        # What could not be measured cannot be ranked.
        table = table.filter(pc.is_in(table["question_id"], pa.array(list(found), pa.string())))
        measured[name] = np.array([found[name] for name in table["question_id"].to_pylist()], dtype=np.float64)
    p_wrong = table["p_wrong"]
    return Candidates(
        question_ids=table["question_id"].to_pylist(),
        score=table["score"].to_numpy(),
        p_unknown=table["p_unknown"].to_numpy(),
        # One axis alone where nothing has been graded: then the column is empty in all shards.
        p_wrong=None if p_wrong.null_count else p_wrong.to_numpy(),
        **measured,
    )


def _chosen_states(campaign: Campaign, extracted: Stage, round_index: int, ids: Sequence[str]) -> np.ndarray:
    read = states_of(extracted, ids, _probe_layer(campaign, round_index))
    row_of = {question_id: row for row, question_id in enumerate(read.ids)}
    return read.states[[row_of[question_id] for question_id in ids], 0]


def _asked_states(campaign: Campaign, extracted: Stage, round_index: int, taken: pa.Array) -> np.ndarray:
    """Of questions asked in earlier rounds, in the order of their ids; decoded ones have none."""
    return states_of(extracted, taken.to_pylist(), _probe_layer(campaign, round_index)).states[:, 0]


def _probe_layer(campaign: Campaign, round_index: int) -> int:
    return int(campaign.stage("probe", round_index).require().metrics["layer"])


@declare("rest", room=lambda config: asking_room(config, local=config.annotator.kind == "local_teacher"))
def annotate(campaign: Campaign, round_index: int) -> Work:
    """Ask the annotator for answers to selected and decoded questions. A batch that is written is never asked again."""
    questions, references = campaign.stage("questions"), campaign.stage("references")
    chosen = [campaign.stage("select", round_index)]
    if campaign.config.decoder.kind != "none":
        chosen.append(campaign.stage("decode", round_index))

    def work(stage: Stage) -> Outcome:
        ids = asked_ids(campaign, round_index)
        text_of = by_id(questions.table(["question_id", "question"], among(ids)), "question")
        text_of |= by_id(kept_questions(campaign, round_index), "question")
        finished = stage.finished_shards()
        refused: Counter[str] = Counter()
        stopped, num_not_asked = None, 0
        with contextlib.ExitStack() as ended, campaign.events.progress(stage.label, len(ids), "questions") as progress:
            local = campaign.config.annotator.kind == "local_teacher"
            placement = ended.enter_context(teacher_workers(campaign, local=local))
            context = annotation_context(campaign, round_index, text_of, placement)
            annotator = annotators.annotator(campaign.config.annotator, context)
            ended.callback(annotator.close)
            size = batch_size(stage, min(annotator.batch_size, max(1, len(ids))))
            batches = [ids[start : start + size] for start in range(0, len(ids), size)]
            for index, batch in enumerate(batches):
                name = shard_name(index)
                if name not in finished:
                    made = annotator.annotate({question_id: text_of[question_id] for question_id in batch})
                    refusals = annotator.refusals
                    of_batch = [refusals[question_id] for question_id in batch if question_id in refusals]
                    refused.update(refusal.reason for refusal in of_batch)
                    rows = pa.Table.from_pylist([annotation._asdict() for annotation in made], schema=ANNOTATIONS)
                    cost = _annotation_cost(annotator, [*made, *of_batch], len(made))
                    write_shard(stage.url, name, rows, cost)
                    campaign.note_shard(stage, name, len(made), cost)
                    stopped = annotator.stopped
                progress.advance(len(batch))
                if stopped:
                    rest = sum(len(later) for later in batches[index + 1 :])
                    num_not_asked = len(batch) - len(made) - len(of_batch) + rest
                    break
        num_annotated = num_rows(stage)
        return {
            "num_annotated": num_annotated,
            "num_refused": len(ids) - num_annotated - num_not_asked,
            "refused": dict(refused.most_common(10)),
            "num_not_asked": num_not_asked,
            "stopped": stopped,
        }, {}

    return Work(annotator_fields(campaign), [questions, references, *chosen], work)


def asking_room(config: RunConfig, *, local: bool) -> Room:
    """What a stage that asks a teacher holds: a local teacher's engines, else the driver alone."""
    return replicas(config.annotator.engine) if local else one_cpu(config)


def teacher_workers(campaign: Campaign, *, local: bool) -> contextlib.AbstractContextManager[Placement]:
    """What asking holds: a local teacher's engines, unless others share them, else the driver alone."""
    config = campaign.config.annotator
    if not local or campaign.leases is not None:
        return contextlib.nullcontext(Placement(0))
    return campaign.hold(config.engine.replicas, config.engine.cpus_per_replica, config.engine.gpus_per_replica)


def _annotation_cost(annotator: Annotator, answered: Sequence[Any], num_annotated: int) -> dict[str, float]:
    """What a batch took: of a teacher all that its journal holds for it, of others what their answers cost."""
    cost = {"annotations": float(num_annotated)}
    if annotator.usage is None:
        return cost | {"money": float(sum(row.cost for row in answered))}
    return cost | annotator.usage.cost_items()


def batch_size(stage: Stage, wanted: int) -> int:
    """Questions a shard, as the stage was begun with: what a shard holds must not change on resume."""
    begun = stage.run.read_bytes(f"{stage.path}/batches.json")
    if begun is None:
        stage.write_file("batches.json", json.dumps({"size": wanted}).encode())
        return wanted
    return int(json.loads(begun)["size"])


def annotator_fields(campaign: Campaign) -> dict[str, Any]:
    """What changes an annotator's answers: its config, and what its reference table or its model holds, never where
    that lies."""
    fields = teacher_fields(campaign.config.annotator)
    if path := campaign.reference_table_path():
        fields["reference_table"] = content_identity(path)
    return fields


def teacher_fields(config: AnnotatorConfig) -> dict[str, Any]:
    """The config's result fields, with what a local teacher's model is in place of where it lies."""
    fields = config.result_fields()
    if config.kind == "local_teacher" and config.teacher is not None:
        fields["teacher"]["model"] = model_name(config.teacher.model)
    return fields


def annotation_context(
    campaign: Campaign, round_index: int, text_of: Mapping[str, str], placement: Placement
) -> AnnotationContext:
    """What the annotator of a round may look at.

    Args:
        text_of: the questions it may be asked.
        placement: of a local teacher's workers.
    """
    references = campaign.stage("references")
    revealed: dict[str, list[str]] = {}

    def reveal(ids: Sequence[str]) -> Mapping[str, list[str]]:
        # Of all that is asked at once: one pass over the pool's references, and not one a batch.
        if not revealed:
            revealed.update(by_id(references.table(["question_id", "answers"], among(text_of)), "answers"))
        return {name: revealed[name] for name in ids if name in revealed}

    def make_tasks(ids: Sequence[str]) -> list[Task]:
        return _tasks(campaign, round_index, {question_id: text_of[question_id] for question_id in ids})

    config = campaign.config
    return AnnotationContext(
        campaign.run,
        round_index,
        reveal,
        campaign.reference_table_path(),
        make_tasks,
        config.equivalence,
        config.budget.money,
        config.seed,
        campaign.log_path(campaign.stage("annotate", round_index)),
        placement,
        config.faults,
        campaign.tags(campaign.stage("annotate", round_index)),
        shared_teacher(campaign, campaign.stage("annotate", round_index)),
    )


def _tasks(campaign: Campaign, round_index: int, text_of: Mapping[str, str]) -> list[Task]:
    """What people see of some questions: the base model's own answers to them, and what the probe thinks."""
    wanted = among(text_of)
    drawn = campaign.stage("observe", 0).table(["question_id", "answer"], wanted & (pc.field("purpose") != "eval"))
    answers: dict[str, Counter[str]] = {}
    for row in drawn.to_pylist():
        answers.setdefault(row["question_id"], Counter())[row["answer"]] += 1
    known = campaign.stage("knowledge", round_index)
    p_unknown = by_id(known.table(["question_id", "p_unknown"], wanted), "p_unknown")
    p_unknown |= by_id(kept_questions(campaign, round_index), "p_unknown")
    groups = campaign.stage("feedback", round_index)
    entropy: Mapping[str, float] = {}
    if groups.manifest() is not None:
        entropy = by_id(groups.table(["question_id", "semantic_entropy"], wanted), "semantic_entropy")
    return [
        Task(name, text, answers.get(name, Counter()).most_common(), p_unknown.get(name), entropy.get(name))
        for name, text in text_of.items()
    ]
