"""A whole campaign on a tiny random model, small enough to be run, killed and resumed in a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KILL_DRIVER = REPOSITORY / "tests" / "helpers" / "kill_driver.py"
#: Rows of the pool's file that cannot be used.
BAD_ROWS: list[dict[str, Any]] = [
    {"id": "blank", "question": "  ", "answers": ["x"]},
    {"id": "unanswered", "question": "Why?", "answers": []},
]


class CampaignFiles(NamedTuple):
    """What `ka2l run` needs."""

    config: Path
    model: Path
    pool: Path
    values: dict[str, Any]
    """What the config file holds."""


class Ended(NamedTuple):
    """A `ka2l` command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    pid: int


#: ka2l(*words, kill=..., log=..., timeout=...) runs a command in its own process; see tests/helpers/kill_driver.py.
Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def campaign_files(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> CampaignFiles:
    """Two rounds on 108 questions in six shards: every stage has a middle to be killed in, and takes seconds."""
    folder = tmp_path_factory.mktemp("campaign")
    model = tiny_models("llama-2")
    pool = folder / "pool.jsonl"
    asked = ("size", "colour", "taste", "name")
    rows: list[dict[str, Any]] = [
        {
            "id": f"q{index:03d}",
            "question": f"What is the {asked[index % 4]} of thing {index // 4}?",
            "answers": [f"answer {index}"],
            "subject": f"thing {index // 4}",
            "kind": asked[index % 4],
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
        "sampler": {"kind": "transformers", "num_samples": 4, "temperature": 0.15, "max_tokens": 4},
        "extraction": {"batch_size": 32},
        "probe": {"kind": "linear", "num_epochs": 10, "num_bootstrap": 50},
        "selection": {"kind": "two_axis", "budget": 12, "explore": 0.25},
        "tuning": {
            "max_steps": 4,
            "batch_size": 16,
            "learning_rate": 0.01,
            "num_rehearsal_samples": 2,
            "checkpoint_steps": 1,
        },
        "evaluation": {"num_samples": 3},
        "ray": {"address": "local", "num_cpus": 2},
    }
    config = folder / "mini.yaml"
    config.write_text(yaml.safe_dump(values))
    return CampaignFiles(config, model, pool, values)


@pytest.fixture(scope="session")
def command_server() -> Iterator[Path]:
    """Socket of a process that imports everything, which takes some seconds, and then forks one for each command."""
    with tempfile.TemporaryDirectory(prefix="ka2l-test-") as folder:  # a socket's path must be short
        address = Path(folder) / "commands"
        # Ray reads this when it is imported. Where nothing is said, the first Ray that is started here sets it.
        environment = {"RAY_AUTH_MODE": "token"} | os.environ
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen()
            number = listener.fileno()
            command = [sys.executable, str(KILL_DRIVER), "--serve", str(number)]
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, pass_fds=[number], start_new_session=True
            )
        with process:
            try:
                yield address
            finally:
                process.kill()


@pytest.fixture(scope="session")
def ka2l(command_server: Path) -> Command:
    """Runs a `ka2l` command as the user would, optionally to be killed at a chosen point."""

    def run(*words: object, kill: dict[str, Any] | None = None, log: Path | None = None, timeout: float = 400) -> Ended:
        environment = os.environ | {"KA2L_TEST_KILL": json.dumps(kill), "KA2L_TEST_LOG": str(log or "")}
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
            said = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
            connection.settimeout(timeout)
            connection.connect(str(command_server))
            request = {"words": [str(word) for word in words], "environment": dict(environment)} | said
            connection.sendall((json.dumps(request) + "\n").encode())
            with connection.makefile("r") as answers:
                pid = int(answers.readline() or pytest.fail("the server of commands has ended"))
                try:
                    returncode = int(answers.readline())
                except BaseException:
                    os.kill(pid, signal.SIGKILL)
                    raise
            stdout, stderr = (Path(path).read_text() for path in said.values())
        return Ended(returncode, stdout, stderr, pid)

    return run


@pytest.fixture(scope="session")
def on_cluster(ray_session: None) -> list[str]:
    """Options that make a command join a Ray that is already there, which saves its start."""
    import ray

    return ["--set", f"ray.address={ray.get_runtime_context().gcs_address}"]


class Finished(NamedTuple):
    """A campaign that ran from beginning to end."""

    run_dir: Path
    files: CampaignFiles
    ended: Ended
    asked: list[str]
    """Ids of the questions that the annotator was asked, in order."""
    options: list[str]
    """Of the command, beside the config."""


@pytest.fixture(scope="session")
def finished(
    ka2l: Command, on_cluster: list[str], campaign_files: CampaignFiles, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """One uninterrupted campaign. Tests must not change it; copy it first.

    What is named first above starts in the background while the rest is made.
    """
    folder = tmp_path_factory.mktemp("finished")
    words = ["run", campaign_files.config, "--run-dir", folder / "run"]
    ended = ka2l(*words, *on_cluster, log=folder / "asked")
    assert ended.returncode == 0, ended.stderr
    return Finished(folder / "run", campaign_files, ended, (folder / "asked").read_text().split(), on_cluster)


@pytest.fixture
def selected(finished: Finished, tmp_path: Path) -> Path:
    """The uninterrupted campaign as it was when the first round's questions had been selected, in a new folder."""
    later = ("annotate", "tune", "round-001", "round-002", "events.jsonl", "summary.json", "ledger.parquet", "*.html")
    shutil.copytree(finished.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns(*later))
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB; skips where this process may not mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "ka2l-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
