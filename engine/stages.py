"""One function a stage: committed tables in, one committed table out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from actors.pool_reader import read_pool
from actors.sampler import ObservePlan
from actors.shards import original_error, wait_until_free
from actors.trainer import run_canary, run_training, write_rows
from engine import build
from engine.artifacts import Stage, filesystem, fingerprint, read_shard, shard_name, write_shard
from engine.campaign import Campaign, Outcome, ShardInput, commit_stage, run_host
from ka2l.canary import check_canary
from ka2l.errors import BudgetError, StageFailedError
from ka2l.evidence import combine
from ka2l.labels import label_questions, split_seed_questions
from ka2l.metrics import auroc_with_ci, forgetting, proportion_with_ci
from ka2l.models import load_tokenizer
from ka2l.probe import Probe, fit_probe, load_probe
from ka2l.prompts import Prompter
from ka2l.records import ANNOTATIONS, KNOWLEDGE, LABELS, SELECTION
from ka2l.seeds import row_seed
from ka2l.selection import Candidates
from ka2l.selection import select as select_candidates
from ka2l.tuning import training_rows

_CANARY_PROMPTS = 8
_ANNOTATION_BATCH = 256


def pool(campaign: Campaign) -> None:
    """Read, check and split the pool: ``questions`` for everybody, ``references`` for annotator and grading alone."""
    config = campaign.config.pool.model_copy(update={"path": campaign.pool_path})
    fields = campaign.config.pool.result_fields() | {
        "path": None,
        "source": _source_identity(campaign),
        "shard_rows": campaign.config.shard_rows,
    }
    questions = campaign.stage("questions")

    def read(stage: Stage) -> Outcome:
        questions.remove()
        stage.finished_shards()
        quarantined: list[pa.Table] = []

        def quarantine(table: pa.Table) -> str:
            quarantined.append(table)
            campaign.run.write_table("quarantine.parquet", pa.concat_tables(quarantined))
            return f"{campaign.run.url}/quarantine.parquet"

        tables = read_pool(
            config, campaign.config.seed, write_quarantine=quarantine, shard_rows=campaign.config.shard_rows
        )
        with campaign.events.progress("pool", tables.counts["usable"], "questions") as progress:
            for index, (rows, references) in enumerate(tables.shards):
                write_shard(questions.url, shard_name(index), rows, {})
                write_shard(stage.url, shard_name(index), references, {})
                campaign.events.emit("shard_written", stage=stage.name, round=None, shard=shard_name(index))
                progress.advance(rows.num_rows)
            if tables.counts["quarantined"]:
                progress.note = f"{tables.counts['quarantined']} quarantined, see quarantine.parquet"
        return tables.counts, {}

    references = commit_stage(campaign, "references", None, config=fields, inputs=[], work=read)
    counts = references.require().metrics
    commit_stage(campaign, "questions", None, config=fields, inputs=[references], work=lambda _: (counts, {}))


def _source_identity(campaign: Campaign) -> str:
    """What the pool's files are, never where they lie. A pool that is committed outlives its source."""
    files, path = filesystem(campaign.pool_path)
    info = files.get_file_info(path)
    if info.type == pa.fs.FileType.Directory:
        infos = files.get_file_info(pa.fs.FileSelector(path, recursive=True))
        return fingerprint(files=sorted([item.base_name, item.size] for item in infos))
    if info.type == pa.fs.FileType.File:
        with files.open_input_stream(path) as stream:
            return fingerprint(start=stream.read(1 << 20).hex(), size=info.size)
    committed = campaign.stage("questions").manifest()
    return fingerprint(name=campaign.pool_path) if committed is None else committed.config["source"]


def check_budget(campaign: Campaign) -> None:
    """Raise BudgetError where the run asks for more annotations than there are candidates."""
    candidates = campaign.stage("questions").require().metrics["candidate"]
    if campaign.budget_cap() > candidates:
        raise BudgetError(
            f"the budget of {campaign.budget_cap()} annotations ({campaign.config.rounds} rounds x "
            f"{campaign.config.selection.budget}) is larger than the pool's {candidates} candidates",
            hint="Lower rounds or selection.budget, or set budget.annotations.",
        )


def observe(campaign: Campaign, round_index: int) -> None:
    """Sample answers from this round's model state: one engine session for all purposes."""
    config = campaign.config
    rehearsal = config.tuning.rehearsal > 0 and round_index == 0 and config.rounds > 0
    greedy = config.tuning.rehearsal_labels == "greedy"
    plan = ObservePlan(
        run_seed=config.seed,
        round_index=round_index,
        num_rehearsal=(1 if greedy else config.tuning.num_rehearsal_samples) if rehearsal else 0,
        rehearsal_share=config.tuning.rehearsal,
        rehearsal_greedy=greedy,
        probe_candidates=config.selection.kind == "semantic_entropy",
    )
    adapter = campaign.adapter_dir(round_index)
    canary = None if adapter is None else json.loads((Path(adapter) / "canary.json").read_text())
    questions = campaign.stage("questions")

    def work(stage: Stage) -> Outcome:
        run_host(
            campaign,
            stage,
            partial(build.sampler_host, campaign.model, config.prompt, config.sampler, plan, adapter, canary),
            {"questions": ShardInput(questions.url)},
            replicas=config.sampler.replicas,
            cpus=config.sampler.cpus_per_replica,
            gpus=config.sampler.gpus_per_replica,
        )
        return {"num_samples": _num_rows(stage), "canary_agrees": None if canary is None else True}, {}

    fields = {
        "sampler": config.sampler.result_fields(),
        "prompt": config.prompt.result_fields(),
        "plan": plan._asdict() | {"run_seed": None},
    }
    commit_stage(
        campaign, "observe", round_index, config=fields, inputs=[questions, *_adapter_input(campaign, round_index)],
        work=work,
    )  # fmt: skip


def _adapter_input(campaign: Campaign, round_index: int) -> list[Stage]:
    return [campaign.stage("tune", round_index - 1)] if round_index else []


def _num_rows(stage: Stage) -> int:
    names = stage.finished_shards()
    return sum(pq.read_metadata(f"{stage.path}/{name}", filesystem=stage.run.fs).num_rows for name in names)


def cluster(campaign: Campaign, round_index: int) -> None:
    """Group the sampled answers by meaning and grade the greedy answers of the eval questions."""
    config = campaign.config
    questions, references = campaign.stage("questions"), campaign.stage("references")
    observed = campaign.stage("observe", round_index)

    def work(stage: Stage) -> Outcome:
        run_host(
            campaign,
            stage,
            partial(build.scorer_host, config.equivalence),
            {
                "questions": ShardInput(questions.url, ["question_id", "question", "split"]),
                "samples": ShardInput(observed.url),
                "references": ShardInput(references.url, eval_only=True),
            },
            replicas=1,
            cpus=1.0,
            gpus=0.0,
        )
        return _cluster_metrics(campaign, stage, round_index), {}

    commit_stage(
        campaign, "cluster", round_index, config=config.equivalence.result_fields(),
        inputs=[questions, references, observed], work=work,
    )  # fmt: skip


def _cluster_metrics(campaign: Campaign, stage: Stage, round_index: int) -> dict[str, Any]:
    names = sorted(stage.finished_shards())
    table = pa.concat_tables([read_shard(stage.url, name) for name in names])
    graded = table.filter(pc.equal(table["purpose"], "eval"))
    probed = table.filter(pc.equal(table["purpose"], "probe"))
    metrics: dict[str, Any] = {"num_eval": graded.num_rows, "num_probed": probed.num_rows}
    if probed.num_rows:
        metrics["mean_semantic_entropy"] = pc.mean(probed["semantic_entropy"]).as_py()
    if graded.num_rows:
        correct = dict(zip(graded["question_id"].to_pylist(), graded["correct"].to_pylist(), strict=True))
        accuracy = proportion_with_ci(np.array(list(correct.values()), dtype=bool))
        metrics |= {"accuracy": accuracy.value, "accuracy_ci": [accuracy.low, accuracy.high]}
        metrics["exact_match"] = pc.mean(graded["exact_match"].cast(pa.float32())).as_py()
        metrics["token_f1"] = pc.mean(graded["token_f1"]).as_py()
        if round_index > 0:
            before = _correct(campaign, 0)
            ids = [name for name in correct if name in before]
            metrics |= forgetting([before[name] for name in ids], [correct[name] for name in ids])
    return metrics


def _correct(campaign: Campaign, round_index: int) -> dict[str, bool]:
    """Whether each eval question was answered right in a round."""
    table = campaign.stage("cluster", round_index).table(["question_id", "purpose", "correct"])
    table = table.filter(pc.equal(table["purpose"], "eval"))
    return dict(zip(table["question_id"].to_pylist(), table["correct"].to_pylist(), strict=True))


def label(campaign: Campaign, round_index: int) -> None:
    """Known or unknown for each seed question, from its semantic entropy."""
    questions, clusters = campaign.stage("questions"), campaign.stage("cluster", round_index)

    def work(stage: Stage) -> Outcome:
        pool_rows = questions.table(["question_id", "split", "group"])
        seeds = pool_rows.filter(pc.equal(pool_rows["split"], "seed"))
        group_of = dict(zip(seeds["question_id"].to_pylist(), seeds["group"].to_pylist(), strict=True))
        table = clusters.table(["question_id", "purpose", "semantic_entropy"])
        entropy_of = {
            row["question_id"]: row["semantic_entropy"]
            for row in table.filter(pc.equal(table["purpose"], "probe")).to_pylist()
        }
        ids = sorted(question_id for question_id in group_of if question_id in entropy_of)
        entropies = np.array([entropy_of[question_id] for question_id in ids])
        splits = split_seed_questions(
            ids, [group_of[question_id] for question_id in ids], campaign.config.labels, campaign.config.seed
        )
        labels = label_questions(ids, entropies, splits)
        columns = {"question_id": ids, "probe_split": splits, "semantic_entropy": entropies, "unknown": labels.unknown}
        write_shard(stage.url, shard_name(0), _table(columns, LABELS), {})
        return {
            "threshold": labels.threshold,
            "unknown_fraction": float(labels.unknown.mean()),
            "num_questions": len(ids),
            "num_rejected": len(group_of) - len(ids),
        }, {}

    commit_stage(
        campaign, "label", round_index, config=campaign.config.labels.result_fields(), inputs=[questions, clusters],
        work=work,
    )  # fmt: skip


def extract(campaign: Campaign, round_index: int) -> None:
    """Hidden states of every question under this round's model state: prefill only."""
    config = campaign.config
    questions = campaign.stage("questions")
    adapter = campaign.adapter_dir(round_index)

    def work(stage: Stage) -> Outcome:
        run_host(
            campaign,
            stage,
            partial(build.extractor_host, campaign.model, config.prompt, config.extraction, adapter),
            {"questions": ShardInput(questions.url, ["question_id", "question", "split"])},
            replicas=config.extraction.replicas,
            cpus=config.extraction.cpus_per_replica,
            gpus=config.extraction.gpus_per_replica,
        )
        return {"num_questions": _num_rows(stage)}, {}

    fields = {"extraction": config.extraction.result_fields(), "prompt": config.prompt.result_fields()}
    commit_stage(
        campaign, "extract", round_index, config=fields, inputs=[questions, *_adapter_input(campaign, round_index)],
        work=work,
    )  # fmt: skip


def probe(campaign: Campaign, round_index: int) -> None:
    """Fit the probe on the seed questions' states; choose the layer."""
    config = campaign.config
    labels, extracted = campaign.stage("label", round_index), campaign.stage("extract", round_index)

    def work(stage: Stage) -> Outcome:
        rows = labels.table().to_pylist()
        ids, states = _states_of(extracted, [row["question_id"] for row in rows])
        row_of = {row["question_id"]: row for row in rows}
        fitted = fit_probe(
            states,
            np.array([row_of[question_id]["unknown"] for question_id in ids]),
            [row_of[question_id]["probe_split"] for question_id in ids],
            _layers(extracted),
            config.probe,
            row_seed(config.seed, round_index, "probe", ""),
        )
        with tempfile.TemporaryDirectory() as folder:
            fitted.save(folder)
            for file in sorted(Path(folder).iterdir()):
                stage.write_file(file.name, file.read_bytes())
        auroc = fitted.metrics["auroc"]
        shown = "not defined" if auroc is None else f"{auroc:.3f}"
        campaign.events.say(f"{stage.label:<22} layer {fitted.layer}, AUROC {shown} for unknown")
        return fitted.metrics, {}

    commit_stage(
        campaign, "probe", round_index, config=config.probe.result_fields(), inputs=[labels, extracted], work=work
    )


def _states_of(extracted: Stage, wanted: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Ids, sorted, and states (num_questions, num_layers, width) of the wanted questions that have some."""
    ids: list[str] = []
    states = []
    for name in extracted.shard_names():
        table = read_shard(extracted.url, name)
        table = table.filter(pc.is_in(table["question_id"], pa.array(wanted, pa.string())))
        ids += table["question_id"].to_pylist()
        states.append(_states(table, extracted))
    order = np.argsort(ids)  # whatever the number of shards, the same rows in the same order
    return [ids[index] for index in order], np.concatenate(states)[order]


def _states(table: pa.Table, extracted: Stage) -> np.ndarray:
    """States of a shard, shape (num_rows, num_layers, width)."""
    column = table["states"].combine_chunks()
    num_layers = len(_layers(extracted))
    width = column.type.list_size // num_layers
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), num_layers, width)


def _layers(extracted: Stage) -> list[int]:
    path = f"{extracted.path}/{extracted.shard_names()[0]}"
    schema = pq.read_schema(path, filesystem=extracted.run.fs)
    return [int(layer) for layer in schema.field("states").metadata[b"layers"].split(b",")]


def feedback(campaign: Campaign, round_index: int) -> None:
    """Was the base model right about what has been annotated since? Its own answers are there: grade them."""
    answers = [campaign.stage("annotate", index) for index in range(round_index)]
    questions, own = campaign.stage("questions"), campaign.stage("observe", 0)
    config = campaign.config.equivalence

    def work(stage: Stage) -> Outcome:
        revealed = {
            row["question_id"]: row["answers"]
            for source in answers
            for row in source.table(["question_id", "answers"]).to_pylist()
        }
        run_host(
            campaign,
            stage,
            partial(build.feedback_host, config, revealed),
            {"questions": ShardInput(questions.url, ["question_id", "question"]), "samples": ShardInput(own.url)},
            replicas=1,
            cpus=1.0,
            gpus=0.0,
        )
        return {"num_questions": _num_rows(stage), "num_annotated": len(revealed)}, {}

    commit_stage(
        campaign, "feedback", round_index, config=config.result_fields(), inputs=[questions, own, *answers], work=work
    )


def knowledge(campaign: Campaign, round_index: int) -> None:
    """The knowledge map: P(unknown) of every question now, and the evidence over all states so far."""
    questions = campaign.stage("questions")
    extracted, probed = campaign.stage("extract", round_index), campaign.stage("probe", round_index)
    base = campaign.stage("extract", 0)
    earlier = [campaign.stage("knowledge", index) for index in range(1, round_index)]
    graded = [campaign.stage("feedback", round_index)] if round_index else []
    first = [campaign.stage("label", 0), base, campaign.stage("probe", 0), *earlier, *graded] if round_index else []

    def work(stage: Stage) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("probe.json", "probe.safetensors"):
                (Path(folder) / name).write_bytes(campaign.run.read_bytes(f"{probed.path}/{name}") or b"")
            fitted = load_probe(folder)
        informed = _probe_with_feedback(campaign, graded[0], round_index) if graded else fitted
        for name in extracted.shard_names():
            table = read_shard(extracted.url, name)
            ids = table["question_id"].to_pylist()
            states = _states(table, extracted)
            logits = fitted.predict_logit(states)
            later = [_aligned(read_shard(old.url, name, ["question_id", "logit"]), ids) for old in earlier]
            if graded:
                rows = read_shard(base.url, name)
                chosen = _states(rows, base)[:, _layers(base).index(informed.layer)]
                then = dict(zip(rows["question_id"].to_pylist(), informed.predict_logit(chosen), strict=True))
                score = combine(np.array([then.get(question_id, 0.0) for question_id in ids]), [*later, logits])
            else:
                score = combine(logits, [])
            components = fitted.pca(states)
            columns = {
                "question_id": table["question_id"],
                "split": table["split"],
                "p_unknown": fitted.predict(states),
                "logit": logits,
                "score": score,
                "pca_0": components[:, 0],
                "pca_1": components[:, 1],
            }
            write_shard(stage.url, name, _table(columns, KNOWLEDGE), {})
        return _knowledge_metrics(campaign, stage, round_index), {}

    answers = [campaign.stage("annotate", index) for index in range(round_index)]
    commit_stage(
        campaign, "knowledge", round_index, config=campaign.config.probe.result_fields(),
        inputs=[questions, extracted, probed, campaign.stage("cluster", round_index), *answers, *first], work=work,
    )  # fmt: skip


def _aligned(table: pa.Table, ids: Sequence[str]) -> np.ndarray:
    found = dict(zip(table["question_id"].to_pylist(), table["logit"].to_pylist(), strict=True))
    return np.array([found.get(question_id, 0.0) for question_id in ids])


def _probe_with_feedback(campaign: Campaign, graded: Stage, round_index: int) -> Probe:
    """The base model's probe fitted again, with "answered wrongly" of the annotated questions as further labels.

    They join the training rows alone: layer, early stopping and calibration still rest on the seed questions.
    """
    config = campaign.config
    base = campaign.stage("extract", 0)
    labels = {
        row["question_id"]: (row["unknown"], row["probe_split"])
        for row in campaign.stage("label", 0).table().to_pylist()
    }
    wrong = {
        row["question_id"]: (not row["correct"], "train")
        for row in graded.table(["question_id", "correct"]).to_pylist()
    }
    layer = campaign.stage("probe", 0).require().metrics["layer"]
    ids, states = _states_of(base, [*labels, *wrong])
    known = labels | wrong
    position = _layers(base).index(layer)
    return fit_probe(
        states[:, [position]],
        np.array([known[question_id][0] for question_id in ids]),
        [known[question_id][1] for question_id in ids],
        [layer],
        config.probe,
        row_seed(config.seed, round_index, "feedback", ""),
    )


def _knowledge_metrics(campaign: Campaign, stage: Stage, round_index: int) -> dict[str, Any]:
    """How well the score finds eval questions that this state answers wrongly, among facts not annotated yet."""
    names = sorted(stage.finished_shards())
    table = pa.concat_tables(
        [read_shard(stage.url, name, ["question_id", "split", "score", "p_unknown"]) for name in names]
    )
    scored = table.filter(pc.equal(table["split"], "eval"))
    candidates = table.filter(pc.equal(table["split"], "candidate"))
    facts = _fact_of(campaign)
    annotated = {facts[name] for name in _annotated_ids(campaign, round_index)} - {None}
    correct = _correct(campaign, round_index)
    pairs = [
        (not correct[name], score)
        for name, score in zip(scored["question_id"].to_pylist(), scored["score"].to_pylist(), strict=True)
        if name in correct and facts[name] not in annotated
    ]
    metrics: dict[str, Any] = {
        "num_unannotated": len(pairs),
        "unknown_fraction": pc.mean(pc.greater_equal(candidates["p_unknown"], 0.5).cast(pa.float32())).as_py()
        if candidates.num_rows
        else None,
    }
    if pairs:
        wrong, scores = zip(*pairs, strict=True)
        estimate = auroc_with_ci(
            np.array(wrong), np.array(scores), row_seed(campaign.config.seed, round_index, "auroc", "")
        )
        metrics |= {"auroc_wrong": estimate.value, "auroc_wrong_ci": [estimate.low, estimate.high]}
    return metrics


def _fact_of(campaign: Campaign) -> dict[str, str | None]:
    table = campaign.stage("questions").table(["question_id", "fact"])
    return dict(zip(table["question_id"].to_pylist(), table["fact"].to_pylist(), strict=True))


def _annotated_ids(campaign: Campaign, before_round: int) -> list[str]:
    ids: list[str] = []
    for index in range(before_round):
        ids += campaign.stage("annotate", index).table(["question_id"])["question_id"].to_pylist()
    return ids


def select(campaign: Campaign, round_index: int) -> None:
    """Choose the questions to annotate by the query strategy."""
    config = campaign.config
    known = campaign.stage("knowledge", round_index)
    chosen_before = [campaign.stage("select", index) for index in range(round_index)]
    observed, extracted = campaign.stage("cluster", round_index), campaign.stage("extract", round_index)
    budget = campaign.num_left(round_index)

    def work(stage: Stage) -> Outcome:
        # Whatever was asked before is not asked again, even where the annotator refused it.
        taken = {name for chosen in chosen_before for name in chosen.table(["question_id"])["question_id"].to_pylist()}
        table = known.table(["question_id", "split", "score", "p_unknown"])
        table = table.filter(pc.equal(table["split"], "candidate"))
        rows = [row for row in table.to_pylist() if row["question_id"] not in taken]
        ids = [row["question_id"] for row in rows]
        candidates = Candidates(
            question_ids=ids,
            score=np.array([row["score"] for row in rows]),
            p_unknown=np.array([row["p_unknown"] for row in rows]),
            entropy=_entropies(observed, ids) if config.selection.kind == "semantic_entropy" else None,
            states=_chosen_states(campaign, extracted, round_index, ids)
            if config.selection.kind == "probe_diverse"
            else None,
        )
        wanted = config.selection.model_copy(update={"budget": min(budget, len(ids))})
        chosen = select_candidates(candidates, wanted, row_seed(config.seed, round_index, "select", ""))
        columns = {
            "question_id": [ids[index] for index in chosen.indices],
            "rank": np.arange(len(chosen.indices)),
            "score": chosen.scores,
            "strategy": [config.selection.kind] * len(chosen.indices),
        }
        write_shard(stage.url, shard_name(0), _table(columns, SELECTION), {})
        return {"strategy": config.selection.kind, "num_selected": len(chosen.indices), "num_candidates": len(ids)}, {}

    commit_stage(
        campaign, "select", round_index, config=config.selection.result_fields() | {"budget": budget},
        inputs=[known, *chosen_before, observed, extracted], work=work,
    )  # fmt: skip


def _entropies(clusters: Stage, ids: Sequence[str]) -> np.ndarray:
    table = clusters.table(["question_id", "purpose", "semantic_entropy"])
    table = table.filter(pc.equal(table["purpose"], "probe"))
    found = dict(zip(table["question_id"].to_pylist(), table["semantic_entropy"].to_pylist(), strict=True))
    return np.array([found[question_id] for question_id in ids])


def _chosen_states(campaign: Campaign, extracted: Stage, round_index: int, ids: Sequence[str]) -> np.ndarray:
    layer = campaign.stage("probe", round_index).require().metrics["layer"]
    position = _layers(extracted).index(layer)
    found: dict[str, np.ndarray] = {}
    for name in extracted.shard_names():
        table = read_shard(extracted.url, name)
        table = table.filter(pc.equal(table["split"], "candidate"))
        found |= dict(zip(table["question_id"].to_pylist(), _states(table, extracted)[:, position], strict=True))
    return np.stack([found[question_id] for question_id in ids])


def annotate(campaign: Campaign, round_index: int) -> None:
    """Ask the annotator for the selected questions' answers. A batch that is written is never asked for again."""
    questions, references = campaign.stage("questions"), campaign.stage("references")
    chosen = campaign.stage("select", round_index)

    def reveal(ids: Sequence[str]) -> Mapping[str, list[str]]:
        rows = references.table().filter(pc.is_in(pc.field("question_id"), pa.array(ids, pa.string())))
        return dict(zip(rows["question_id"].to_pylist(), rows["answers"].to_pylist(), strict=True))

    def work(stage: Stage) -> Outcome:
        annotator = build.annotator(campaign.config.annotator, reveal)
        table = questions.table(["question_id", "question"])
        text_of = dict(zip(table["question_id"].to_pylist(), table["question"].to_pylist(), strict=True))
        ids = chosen.table(["question_id"])["question_id"].to_pylist()
        batches = [ids[start : start + _ANNOTATION_BATCH] for start in range(0, len(ids), _ANNOTATION_BATCH)]
        finished = stage.finished_shards()
        with campaign.events.progress(stage.label, len(ids), "questions") as progress:
            for index, batch in enumerate(batches):
                name = shard_name(index)
                if name not in finished:
                    made = annotator.annotate({question_id: text_of[question_id] for question_id in batch})
                    rows = pa.Table.from_pylist([annotation._asdict() for annotation in made], schema=ANNOTATIONS)
                    spent = {"annotations": float(len(made)), "money": float(sum(row.cost for row in made))}
                    write_shard(stage.url, name, rows, spent)
                    campaign.events.emit("shard_written", stage=stage.name, round=round_index, shard=name)
                progress.advance(len(batch))
        num_annotated = _num_rows(stage)
        return {"num_annotated": num_annotated, "num_refused": len(ids) - num_annotated}, {}

    commit_stage(
        campaign, "annotate", round_index, config=campaign.config.annotator.result_fields(),
        inputs=[questions, references, chosen], work=work,
    )  # fmt: skip


def tune(campaign: Campaign, round_index: int) -> None:
    """Train the next adapter on all annotations so far and on the base model's own answers to the rest."""
    config = campaign.config
    answers = [campaign.stage("annotate", index) for index in range(round_index + 1)]
    own = campaign.stage("observe", 0)
    previous = _adapter_input(campaign, round_index) if config.tuning.start == "previous" else []

    def work(stage: Stage) -> Outcome:
        log = campaign.log_path(stage)
        scratch = Path(tempfile.mkdtemp(prefix="ka2l-tune-"))
        try:
            prompter = Prompter(load_tokenizer(campaign.model), config.prompt)
            rows = _training_rows(campaign, answers, own, prompter)
            write_rows(rows, str(scratch / "rows.jsonl"))
            cpus = config.tuning.cpus_per_worker * config.tuning.workers
            gpus = config.tuning.gpus_per_worker * config.tuning.workers
            wait_until_free(cpus, gpus, config.ray.release_timeout_s)
            output = scratch / "adapter"
            metrics = _train(campaign, stage, prompter, scratch, output, round_index)
            canary = _canary(campaign, output, prompter, log)
            for file in sorted(output.iterdir()):
                if file.is_file():
                    stage.write_file(f"adapter/{file.name}", file.read_bytes())
            stage.write_file("adapter/canary.json", json.dumps(canary).encode())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        shown = {key: canary[key] for key in ("max_logit_difference", "num_changed_tokens")}
        sources = {row.question_id: row.source for row in rows}
        counts = {f"num_{kind}": list(sources.values()).count(kind) for kind in ("annotation", "rehearsal")}
        return metrics | counts | {"canary": shown}, {"tokens_trained": float(metrics["num_tokens"])}

    commit_stage(
        campaign, "tune", round_index,
        config={"tuning": config.tuning.result_fields(), "prompt": config.prompt.result_fields()},
        inputs=[*answers, own, *previous], work=work,
    )  # fmt: skip


def _training_rows(campaign: Campaign, answers: Sequence[Stage], own: Stage, prompter: Prompter) -> list[Any]:
    table = campaign.stage("questions").table(["question_id", "question"])
    text_of = dict(zip(table["question_id"].to_pylist(), table["question"].to_pylist(), strict=True))
    annotated = [
        (row["question_id"], prompter.text(row["question"]), row["answers"][0])
        for stage in answers
        for row in stage.table(["question_id", "question", "answers"]).to_pylist()
    ]
    samples: dict[str, list[str]] = {}
    if campaign.config.tuning.rehearsal > 0:
        # Seed questions were sampled for the probe: their answers rehearse at no further cost.
        drawn = own.table(["question_id", "purpose", "sample_index", "answer"])
        for row in drawn.sort_by([("question_id", "ascending"), ("sample_index", "ascending")]).to_pylist():
            if row["purpose"] in ("probe", "rehearsal"):
                samples.setdefault(row["question_id"], []).append(row["answer"])
    rehearsal = [(name, prompter.text(text_of[name]), kept) for name, kept in samples.items()]
    return training_rows(annotated, rehearsal, campaign.config.tuning, campaign.config.seed, chat=prompter.is_chat)


def _train(
    campaign: Campaign, stage: Stage, prompter: Prompter, scratch: Path, output: Path, round_index: int
) -> dict[str, Any]:
    config = campaign.config
    with campaign.events.progress(stage.label, 1, "steps") as progress:

        def on_progress(report: dict[str, Any]) -> None:
            if "step" in report:
                progress.bar.update(progress.task, total=report["num_steps"])
                progress.advance(report["step"] - progress.done, f"loss {report['loss']:.3f}")
                campaign.events.emit("training_step", round=round_index, **report)

        metrics = run_training(
            model_path=campaign.model.path,
            rows_path=str(scratch / "rows.jsonl"),
            config=config.tuning,
            output_dir=str(output),
            seed=row_seed(config.seed, round_index, "tune", ""),
            scratch_dir=str(scratch / "train"),
            previous_adapter=campaign.adapter_dir(round_index) if config.tuning.start == "previous" else None,
            trust_remote_code=campaign.model.trust_remote_code,
            log_path=campaign.log_path(stage),
            on_progress=on_progress,
            chat=prompter.is_chat,
        )
        progress.advance(metrics["num_steps"] - progress.done, f"loss {metrics['last_loss']:.3f}")
    return metrics


def _canary(campaign: Campaign, adapter: Path, prompter: Prompter, log: str) -> dict[str, Any]:
    """PEFT's side of the canary; the next observation checks the serving engine against it."""
    config = campaign.config
    table = campaign.stage("questions").table(["question_id", "question"]).sort_by("question_id")
    prompts = [prompter.text(question) for question in table["question"].to_pylist()[:_CANARY_PROMPTS]]
    gpus = min(1.0, config.tuning.gpus_per_worker)
    arguments = {
        "model_path": campaign.model.path,
        "adapter_dir": str(adapter),
        "prompts": prompts,
        "max_tokens": min(16, config.sampler.max_tokens),
        "dtype": "bfloat16" if gpus and campaign.model.dtype in ("auto", "bfloat16") else "float32",
        "device": "cuda" if gpus else "cpu",
        "trust_remote_code": campaign.model.trust_remote_code,
        "chat": prompter.is_chat,
    }
    wait_until_free(config.tuning.cpus_per_worker, gpus, config.ray.release_timeout_s)
    remote = run_canary.options(num_cpus=config.tuning.cpus_per_worker, num_gpus=gpus)
    try:
        result: dict[str, Any] = ray.get(remote.remote(log, arguments))
    except ray.exceptions.RayError as error:
        found = original_error(error)
        if found is error:
            raise StageFailedError(f"the canary could not run: {error}") from error
        raise found from error
    check_canary(result)
    return result


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of exactly this schema."""
    arrays = [
        column.cast(field.type) if isinstance(column, pa.ChunkedArray | pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in schema)
    ]
    return pa.table(arrays, schema=schema)
