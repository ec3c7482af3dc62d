from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.tuner import read_rows, run_canary, run_training, write_rows
from actors.workers.ray_task import Workers
from actors.workers.ray_train import _Follower, _tidy
from ka2l.errors import ModelError, ResourcesBusyError, StageFailedError
from ka2l.model.adapter import AdapterConfig
from ka2l.schemas import TrainingRow
from ka2l.tuning.checkpoints import CheckpointFolder
from ka2l.tuning.sft import TuningConfig, training_rows, tune

NAMES = ["Lima", "Oslo", "Rome", "Cairo", "Quito", "Seoul", "Bern", "Minsk", "Accra", "Dhaka"]
FACTS = [(f"q{i:02d}", f"Question: Where does person {i} live?\nAnswer:", NAMES[i]) for i in range(10)]

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[..., Path]) -> str:
    return str(tiny_models("llama-2"))


def train(model: str, tmp_path: Path, config: TuningConfig, **arguments: Any) -> dict[str, Any]:
    rows_path = tmp_path / "rows.jsonl"
    tmp_path.mkdir(exist_ok=True)
    write_rows(training_rows(FACTS, [], config, 0, chat=False), str(rows_path))
    return run_training(
        model,
        str(rows_path),
        config,
        str(tmp_path / "adapter"),
        seed=0,
        scratch_dir=str(tmp_path / "scratch"),
        log_path=str(tmp_path / "tune.log"),
        chat=False,
        **arguments,
    )


def train_here(model: str, folder: Path, config: TuningConfig) -> dict[str, Any]:
    """Without Ray, on one thread as a worker."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = training_rows(FACTS, [], config, 0, chat=False)
        return tune(model, rows, config, str(folder), 0, chat=False).metrics
    finally:
        torch.set_num_threads(num_threads)


def test_rows_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    rows = [TrainingRow("Q: é\n\u2028", " ü", "annotation", "q"), TrainingRow("", " x", "rehearsal", "r")]
    write_rows(rows, str(tmp_path / "rows.jsonl"))
    assert read_rows(str(tmp_path / "rows.jsonl"), TrainingRow) == rows


def test_progress_lines_are_handed_on_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    reports: list[dict[str, Any]] = []
    follower = _Follower(path, reports.append)
    assert follower._new_reports() == []
    path.write_text('{"step": 1}\n{"st')
    assert follower._new_reports() == [{"step": 1}]
    with follower, path.open("a") as file:
        file.write('ep": 2}\n')
    assert reports == [{"step": 2}]


@pytest.mark.slow
def test_two_workers_train_the_adapter_that_one_process_trains(llama: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    handler = signal.getsignal(signal.SIGINT)
    config = TuningConfig(
        max_steps=12, batch_size=10, learning_rate=2e-3, workers=2, dtype="float32", checkpoint_steps=5
    )
    reports: list[dict[str, Any]] = []
    kept = CheckpointFolder(str(tmp_path / "kept"))
    two = train(llama, tmp_path, config, on_progress=reports.append, checkpoints=kept)
    (last,) = (tmp_path / "kept" / "workers-2").glob("checkpoint_*/")
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 10
    assert len(list(last.glob("rng_state*"))) == 2
    # Ray may lose its controller, and then the steps since the checkpoint are told of again.
    assert list(dict.fromkeys(report["step"] for report in reports)) == list(range(1, 13))
    assert reports[-1]["loss"] == two["last_loss"]
    assert "Loading weights" in (tmp_path / "tune.log").read_text()
    assert signal.getsignal(signal.SIGINT) is handler

    one = train_here(llama, tmp_path / "one", config)
    for key in ("num_rows", "num_steps", "batch_size", "num_tokens", "example"):
        assert one[key] == two[key]
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-3)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", tmp_path / "adapter"))
    assert all(abs(a[name] - b[name]).max() < 1e-3 for name in a)
    assert max(abs(a[name]).max() for name in a if "lora_B" in name) > 1e-2


@pytest.mark.slow
def test_training_whose_worker_is_killed_goes_on_from_its_checkpoint_to_the_same_bytes(
    llama: str, tmp_path: Path
) -> None:
    import fsspec
    from pyarrow import fs as pafs

    config = TuningConfig(max_steps=60, batch_size=10, learning_rate=2e-3, dtype="float32", checkpoint_steps=6)
    reports: list[dict[str, Any]] = []

    def kill_once_there_is_one(report: dict[str, Any]) -> None:
        reports.append(report)
        if len(reports) == 5:  # steps 1, 6, 12, 18 and 24
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # children come and go
                    if "".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                        process.kill()

    # As behind a URL: a file system of fsspec, handed to the workers.
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("file")))
    kept = CheckpointFolder(str(tmp_path / "kept"), remote)
    result = train(llama, tmp_path, config, on_progress=kill_once_there_is_one, checkpoints=kept)
    assert result["num_steps"] == 60
    assert (tmp_path / "tune.log").read_text().count("Loading weights") >= 2
    steps = [report["step"] for report in reports]
    assert steps.count(1) == 1
    assert set(steps) == {1, *range(6, 61, 6)}
    assert reports[-1]["loss"] == result["last_loss"]
    (last,) = (path for path in (tmp_path / "kept" / "workers-1").iterdir() if path.is_dir())
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 54
    assert len(list(last.glob("rng_state*"))) == 1

    train_here(llama, tmp_path / "undisturbed", config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_checkpoints_that_were_not_taken_up_are_removed_and_all_where_the_note_is_broken(tmp_path: Path) -> None:
    kept = CheckpointFolder(str(tmp_path))
    folder = tmp_path / "workers-1"
    for name in ("checkpoint_1", "checkpoint_2"):
        (folder / name).mkdir(parents=True)
    note = folder / "checkpoint_manager_snapshot.json"
    one = {"checkpoint_dir_name": "checkpoint_1", "metrics": {}}
    whole = json.dumps({"latest_checkpoint_result": one, "checkpoint_results": [one]})
    note.write_text(whole)
    _tidy(kept, "workers-1")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_1", note.name]
    note.write_text(whole[:20])
    _tidy(kept, "workers-1")
    assert not folder.exists()
    _tidy(kept, "workers-1")


@pytest.mark.slow
def test_an_error_raised_in_a_worker_arrives_as_it_was_raised(llama: str, tmp_path: Path) -> None:
    config = TuningConfig(max_steps=1, workers=2, adapter=AdapterConfig(target_modules=["no_such_layer"]))
    with pytest.raises(ModelError, match="no_such_layer") as caught:
        train(llama, tmp_path, config)
    assert "q_proj" in str(caught.value.hint)


@pytest.mark.slow
def test_any_other_error_carries_the_end_of_the_log(llama: str, tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.jsonl"
    rows_path.write_text("this is not JSON\n")
    with pytest.raises(StageFailedError, match=r"JSONDecodeError: Expecting value[\s\S]*tune\.log") as caught:
        run_training(
            llama,
            str(rows_path),
            TuningConfig(),
            str(tmp_path / "adapter"),
            seed=0,
            scratch_dir=str(tmp_path / "scratch"),
            log_path=str(tmp_path / "tune.log"),
            chat=False,
        )
    assert "read_rows" in caught.value.message


@pytest.mark.slow
def test_workers_that_find_no_room_are_an_error_that_says_so(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    with pytest.raises(ResourcesBusyError, match="3 tuning worker"):
        train(llama, tmp_path, TuningConfig(max_steps=1, workers=3))


@pytest.mark.slow
def test_canary_runs_in_its_own_process_and_raises_its_own_errors(llama: str, tmp_path: Path) -> None:

    arguments = {"model_path": llama, "adapter_dir": str(tmp_path / "none"), "prompts": ["A:"], "chat": False}
    with pytest.raises(ModelError, match="adapter_config"):
        run_canary(arguments, Workers("tuning", 1, 1.0, 0.0), str(tmp_path / "canary.log"))
