"""Where results lie, and what machine, versions and revision they were made with.

``results/QUESTION/MACHINE-DATE.json``: one file for each machine and day on which a question was measured.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.store.manifest import git_revision, versions
from ka2l.evaluation.statistics import json_safe

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
#: Options of benchmarks that say where files go and change no figure.
WHERE = ("--out", "--work", "--scratch", "--keep", "--peers-python")


def gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    import torch  # seconds to import: only where a result is written

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def command(argv: Sequence[str]) -> str:
    """What somebody else would type, in the repository: without where this machine kept runs and result."""
    script, words = Path(argv[0]).resolve(), list(argv[1:])
    for option in WHERE:
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    words = [word for word in words if word.partition("=")[0] not in WHERE]
    name = script.relative_to(REPOSITORY).as_posix() if script.is_relative_to(REPOSITORY) else script.name
    return shlex.join(["python", name, *words])


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat or doubt a result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = gpus()
    return {
        "command": command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.machine(),
            "num_cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "system": platform.system(),
            "gpu": found[0] if found else None,
            "num_gpus": len(found),
        },
        "versions": versions(),
        "git_revision": git_revision(),
    }


def machine_name(machine: Mapping[str, Any]) -> str:
    """A machine as part of a file's name: ``x86_64-2cores``, ``x86_64-16cores-nvidia-h100-80gb-hbm3``."""
    words = [str(machine["processor"]), f"{machine['num_cores']}cores"]
    if machine.get("gpu"):
        words.append(re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-"))
    if machine.get("num_gpus", 0) > 1:
        words.append(f"x{machine['num_gpus']}")
    return "-".join(words)


def write_result(question: str, result: Mapping[str, Any], path: str | Path | None = None) -> Path:
    """Write ``result`` with its provenance; a second one of a machine and day replaces the first.

    Args:
        path: where to, in place of ``results/QUESTION/MACHINE-DATE.json``.
    """
    whole = provenance() | dict(result)
    name = f"{machine_name(whole['machine'])}-{whole['date'][:10]}.json"
    target = Path(path) if path else RESULTS / question / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(json_safe(whole), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def latest_file(question: str, results: Path | None = None) -> Path | None:
    """The file of the newest result by the date in its provenance, of whatever machine; None where there is none.

    Args:
        results: the folder of all questions; ``benchmarks/results`` where not given.
    """
    files = sorted((RESULTS if results is None else results).joinpath(question).glob("*.json"))
    dates = {file: datetime.fromisoformat(json.loads(file.read_text(encoding="utf-8"))["date"]) for file in files}
    return max(files, key=dates.__getitem__, default=None)


def latest_result(question: str, results: Path | None = None) -> dict[str, Any] | None:
    """What the newest result file of a question holds; None where it was never measured."""
    file = latest_file(question, results)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))
