"""Reads other runs to compare with, and refuses those that no fair comparison can be made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from engine.report.data import ReportData
from engine.report.reader import Reader
from engine.report.stages import collect_stages
from engine.store.run_directory import RunDirectory
from engine.store.shards import read_shard
from engine.store.stage_folder import Stage
from ka2l.errors import RunDirectoryError
from ka2l.evaluation.facts import compare_facts, counts_of, win_rates

_SAME = "A baseline must ask the same model the same questions in the same way; only what is annotated may differ."


def read_baseline(mine: RunDirectory, url: str) -> ReportData:
    """What another run spent and reached.

    Raises:
        RunDirectoryError: there is no finished run, or it is of another model or pool, or was measured in another way.
        DamagedShardError: its pool cannot be read.
    """
    other = RunDirectory(url)
    if not other.exists():
        raise RunDirectoryError(f"{other.url} holds no run", hint="--baseline takes the folder or URL of a run.")
    if other.url == mine.url:
        raise RunDirectoryError(f"{other.url} is the run itself", hint="--baseline takes other runs.")
    data = collect_stages(Reader(other))
    if data.status != "complete":
        raise RunDirectoryError(
            f"the baseline {other.url} is not finished: {data.status}", hint=f"Finish it: ka2l resume {other.url}"
        )
    _check_same(mine, other)
    return data


def aspects_against(mine: RunDirectory, other: RunDirectory) -> dict[str, Any]:
    """Wins, ties and losses of this run's last state against another's, by the facts that both have counted.

    Empty where not both have counted facts, or not in the same way. Reads files only.
    """
    evaluated = [_last_evaluated(run) for run in (mine, other)]
    if any(stage is None for stage in evaluated):
        return {}
    manifests = [stage.require() for stage in evaluated if stage is not None]
    counted_by = [(m.config.get("facts"), m.config.get("teacher")) for m in manifests]
    if counted_by[0] != counted_by[1] or counted_by[0][0] in (None, "none"):
        return {}
    ours, theirs = (counts_of(stage.table().to_pylist()) for stage in evaluated if stage is not None)
    both = sorted(ours.keys() & theirs.keys())
    return win_rates([compare_facts(ours[name], theirs[name]) for name in both], manifests[0].seed)


def _last_evaluated(run: RunDirectory) -> Stage | None:
    stages = (run.stage("evaluate", index) for index in reversed(range(run.num_rounds_begun())))
    return next((stage for stage in stages if stage.manifest() is not None), None)


def _check_same(mine: RunDirectory, other: RunDirectory) -> None:
    ours, theirs = (run.stage("questions").require() for run in (mine, other))
    models = [manifest.config.get("run", {}).get("model", {}) for manifest in (ours, theirs)]
    if not all("content" in model for model in models):
        raise RunDirectoryError(f"{other.url} and {mine.url} do not both say which model they ask", hint=_SAME)
    if difference := _first_difference(*models):
        raise RunDirectoryError(
            f"the baseline {other.url} asks another model than {mine.url}: {difference}", hint=_SAME
        )
    if ours.fingerprint != theirs.fingerprint and pool_digest(mine) != pool_digest(other):
        counts = [
            ", ".join(f"{m.metrics.get(split)} {split}" for split in ("candidate", "eval")) for m in (ours, theirs)
        ]
        raise RunDirectoryError(
            f"the baseline {other.url} asks other questions than {mine.url} ({counts[1]}; here {counts[0]})",
            hint=f"{_SAME} A pool without a split column is split by the run's seed: give both runs the same.",
        )
    for name, measured in (("observe", _asking), ("cluster", dict)):
        manifests = [run.stage(name, 0).manifest() for run in (mine, other)]
        configs = [{} if manifest is None else measured(manifest.config) for manifest in manifests]
        if difference := _first_difference(*configs):
            raise RunDirectoryError(
                f"the baseline {other.url} measures accuracy in another way than {mine.url}: {difference}", hint=_SAME
            )


def _asking(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of an observation's config greedy answers depend on."""
    sampler = config.get("sampler", {})
    return {**config.get("prompt", {}), **{key: sampler[key] for key in ("max_tokens", "stop") if key in sampler}}


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first key on which both have a value, and not the same. A key that one version does not know says nothing."""
    for key in sorted((ours.keys() & theirs.keys()) - {"trust_remote_code", "run"}):
        if ours[key] != theirs[key]:
            return f"{key} {theirs[key]!r}, here {ours[key]!r}"
    return None


def pool_digest(run: RunDirectory) -> int:
    """Hash of a pool's questions, splits and answers, whatever their order and the size of the shards."""
    digest = 0
    for name, columns in (
        ("questions", ["question_id", "question", "split"]),
        ("references", ["question_id", "answers"]),
    ):
        stage = run.stage(name)
        stage.verify()
        for shard in stage.shard_names():
            for row in zip(*read_shard(stage.url, shard, columns).to_pydict().values(), strict=True):
                digest += int.from_bytes(hashlib.blake2b(repr((name, *row)).encode(), digest_size=8).digest())
    return digest % 2**64
