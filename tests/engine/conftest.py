"""A whole campaign on a tiny random model, small enough to be run, killed and resumed in a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("kill_driver.py")

#: Rows of the pool's file that cannot be used.
BAD_ROWS = ({"id": "blank", "question": "  ", "answers": ["x"]}, {"id": "no-answer", "question": "Why?", "answers": []})


class CampaignFiles(NamedTuple):
    """What `ka2l run` needs."""

    config: Path
    model: Path
    pool: Path
    values: dict[str, Any]
    """What the config file holds."""


@pytest.fixture(scope="session")
def campaign_files(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> CampaignFiles:
    """Two rounds on 108 questions in six shards: every stage has a middle to be killed in, and costs seconds."""
    folder = tmp_path_factory.mktemp("campaign")
    model = tiny_models("llama-2")
    pool = folder / "pool.jsonl"
    rows = [
        {
            "id": f"q{index:03d}",
            "question": f"What is the {['size', 'colour', 'taste', 'name'][index % 4]} of thing {index // 4}?",
            "answers": [f"answer {index}"],
            "subject": f"thing {index // 4}",
            "kind": index % 4,
        }
        for index in range(108)
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:50], *BAD_ROWS, rows[7], *rows[50:]]))
    values = {
        "name": "mini",
        "rounds": 2,
        "shard_rows": 20,
        "model": {"path": str(model), "dtype": "float32"},
        "pool": {"path": str(pool), "columns": {"group": "subject"}, "num_seed": 24, "num_eval": 24},
        "prompt": {"template": "plain", "instruction": "", "num_shots": 0},
        "sampler": {"kind": "transformers", "num_samples": 4, "temperature": 0.7, "max_tokens": 4},
        "extraction": {"batch_size": 32},
        "probe": {"kind": "linear", "num_epochs": 10, "num_bootstrap": 50},
        "selection": {"budget": 12},
        "tuning": {"max_steps": 4, "batch_size": 16, "learning_rate": 0.01, "num_rehearsal_samples": 2},
        "ray": {"address": "local", "num_cpus": 2},
    }
    config = folder / "mini.yaml"
    config.write_text(yaml.safe_dump(values))
    return CampaignFiles(config, model, pool, values)


def run_driver(
    *words: str, kill: dict[str, Any] | None = None, log: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a `ka2l` command in a process of its own, which kills itself where ``kill`` says; see kill_driver.py."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "KA2L_TEST_KILL": json.dumps(kill),
        "KA2L_TEST_LOG": str(log or ""),
    }
    return subprocess.run(
        [sys.executable, str(DRIVER), *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB; skips where this process may not mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "ka2l-test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
