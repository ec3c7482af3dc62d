"""The machine, versions and revision that a result was made with."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.artifacts import git_revision, json_safe, versions

RESULTS = Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat or doubt a result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.machine(),
            "num_cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "system": platform.system(),
        },
        "versions": versions(),
        "git_revision": git_revision(),
    }


def write_result(name: str, result: dict[str, Any], path: str | None = None) -> Path:
    """Write ``results/NAME.json`` with its provenance."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(json_safe(provenance() | result), indent=1, ensure_ascii=False) + "\n")
    return target
