"""Reads a run's config and manifests: the inputs of its cost table and learning curve."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import ValidationError

from engine.config import RunConfig
from engine.forecast.prices import PricesConfig
from engine.report.data import ReportData, RoundReport, StageReport
from engine.report.reader import Reader
from engine.stages import pool_folders, round_folders
from engine.store.manifest import Manifest


def collect_stages(reader: Reader, status: str | None = None, reason: str | None = None) -> ReportData:
    """A run without what is read from tables, but for the number of tokens that answers took.

    Args:
        status: running | paused | complete | failed; None takes it from an earlier ``summary.json``, else running.
        reason: why it stopped or pauses; with ``status`` None taken from an earlier ``summary.json``, too.
    """
    run = reader.run
    config_text = reader.text("config.yaml")
    config = reader.parsed(config_text)
    earlier = reader.json("summary.json")
    model = config.get("model")
    data = ReportData(
        name=str(config.get("name") or run.url.rstrip("/").rsplit("/", 1)[-1]),
        status=status or str(earlier.get("status") or "running"),
        reason=reason if status else earlier.get("reason"),
        model=str(model.get("path", "")) if isinstance(model, dict) else str(model or ""),
        command="probe" if reader.text("mode").strip() == "probe" else "run",
        location=run.url,
        config_yaml=config_text,
        config=_validated(config),
        prices=_prices(reader, config),
        seed=config.get("seed") if isinstance(config.get("seed"), int) else None,
        problems=reader.problems,
    )
    manifests = [(name, manifest) for name in pool_folders() if (manifest := reader.manifest(name, None))]
    data.pool_stages = {name: _stage_report(manifest) for name, manifest in manifests}
    found = [manifest for _, manifest in manifests]
    for index in range(run.num_rounds_begun()):
        committed = {name: manifest for name in round_folders() if (manifest := reader.manifest(name, index))}
        data.rounds.append(
            RoundReport(
                index,
                {name: _stage_report(item) for name, item in committed.items()},
                answer_tokens=_answer_tokens(reader, index),
            )
        )
        found += committed.values()
    if found:
        latest = max(found, key=lambda manifest: manifest.committed_at)
        data.versions, data.git_revision = latest.versions, latest.git_revision
        data.seed = latest.seed if data.seed is None else data.seed
    return data


def _stage_report(manifest: Manifest) -> StageReport:
    # A cost may add up seconds of several workers; what a reader of the report waits for is wall-clock time.
    return StageReport(manifest.metrics, {**manifest.cost, "seconds": manifest.seconds})


def _validated(config: dict[str, Any]) -> RunConfig | None:
    try:
        return RunConfig.model_validate(config)
    except ValidationError:  # of another version; the report can do without
        return None


def _prices(reader: Reader, config: dict[str, Any]) -> PricesConfig:
    try:
        return PricesConfig.model_validate(config.get("prices") or {})
    except ValidationError as error:
        reader.note("config.yaml", ValueError(f"prices: {error.errors()[0]['msg']}"))
        return PricesConfig()


def _answer_tokens(reader: Reader, index: int) -> dict[str, int]:
    """Generated tokens of one observation by the answers' purpose."""
    tokens: Counter[str] = Counter()
    for table in reader.shards("observe", index, ["purpose", "num_tokens"]):
        sums = table.group_by("purpose").aggregate([("num_tokens", "sum")])
        for purpose, number in zip(sums["purpose"].to_pylist(), sums["num_tokens_sum"].to_pylist(), strict=True):
            tokens[purpose] += number
    return dict(tokens)
