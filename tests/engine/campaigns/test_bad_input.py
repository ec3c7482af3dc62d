"""What a user can get wrong: each has its own message, exit code 2, no traceback, and nothing is written over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from engine import launch
from engine.cli import benchmark, main
from engine.store.run_directory import RunDirectory

slow = pytest.mark.slow


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a `ka2l` command in this process that must be refused before Ray starts; returns what stderr says."""

    def run(*words: object) -> str:
        def no_ray(*_: object) -> None:
            raise AssertionError("Ray was started for a command that cannot work")

        for module in (main, benchmark, launch):
            monkeypatch.setattr(module, "RaySession", no_ray)
        monkeypatch.setattr(sys, "argv", ["ka2l", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        said = capsys.readouterr()
        assert said.out == ""
        return check(ended.value.code, said.err)

    return run


def check(returncode: Any, stderr: str) -> str:
    assert returncode == 2, stderr
    assert "Traceback" not in stderr
    assert "error: " in stderr
    return " ".join(stderr.split())


@pytest.fixture
def write_config(campaign_files: Any, tmp_path: Path) -> Callable[..., Path]:
    """The mini campaign with other sections."""

    def write(**sections: Any) -> Path:
        values = {
            key: value | sections.get(key, {}) if isinstance(value, dict) else sections.get(key, value)
            for key, value in campaign_files.values.items()
        }
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(values | {k: v for k, v in sections.items() if k not in values}))
        return path

    return write


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_stages(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith(("pool/", "round-"))}


# -- found before anything is written or started -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"samplr": {}}, "unknown key 'samplr', did you mean 'sampler'?"),
        ({"tuning": {"adapter": {"rank": 4}}}, "unknown key 'tuning.adapter.rank'"),
        ({"rounds": "many"}, "rounds: Input should be a valid integer"),
        ({"model": {"path": "/no/such/model"}}, "model directory /no/such/model does not exist"),
        ({"ray": {"address": "127.0.0.1:9"}}, "no Ray cluster answers at 127.0.0.1:9"),
        ({"sampler": {"num_samples": 1}}, "sampler.num_samples: Input should be greater than or equal to 2"),
        ({"pool": {"path": "/no/such/pool.jsonl"}}, "pool.path '/no/such/pool.jsonl': no JSONL or Parquet file there"),
        (
            {"pool": {"columns": {"question": "asked"}}},
            "can be used: malformed: no column 'asked' (the row has: answers",
        ),
        ({"tuning": {"adapter": {"target_modules": ["no_such_module"]}}}, "has no module named 'no_such_module'"),
        ({"tuning": {"adapter": {"target_modules": ".*no_such"}}}, "lora cannot be put on the model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.parametrize("command", ["run", "probe"])
def test_a_config_that_cannot_work_is_refused_before_anything_is_written(
    command: str, sections: dict[str, Any], said: str, write_config: Any, refused: Any, tmp_path: Path
) -> None:
    assert said in refused(command, write_config(**sections), "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_budget_larger_than_the_pool_can_be_is_refused_before_anything_is_written(
    command: str, write_config: Any, refused: Any, tmp_path: Path
) -> None:
    options = ("--run-dir", tmp_path / "run") if command == "run" else ()
    message = refused(command, write_config(selection={"budget": 60}), *options)
    assert "the budget of 120 annotations (2 rounds x 60) is larger than the 87 candidates that" in message
    assert not (tmp_path / "run").exists()


def test_a_testbed_is_not_built_for_a_run_that_cannot_work(
    refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ka2l.testbed.build.build_testbed", lambda *_: pytest.fail("the testbed was built"))
    monkeypatch.setenv("KA2L_CACHE", str(tmp_path))
    words = ["run", "quickstart", "--run-dir", tmp_path / "run", "--set", "testbed.seed=7"]
    assert "model directory /no/such/model does not exist" in refused(*words, "--set", "model.path=/no/such/model")
    assert "larger than the 1200 candidates that testbed can hold" in refused(*words, "--set", "selection.budget=601")


@pytest.mark.parametrize("command", ["run", "probe", "estimate", "config"])
def test_a_missing_config_file_is_named(command: str, refused: Any) -> None:
    assert "no preset and no file named 'no/such.yaml'" in refused(command, "no/such.yaml")


def test_a_key_in_the_wrong_form_is_refused(refused: Any, campaign_files: Any) -> None:
    assert "--set 'rounds' is not of the form a.b=c" in refused("config", campaign_files.config, "--set", "rounds")


def test_an_unknown_option_is_refused(refused: Any, campaign_files: Any) -> None:
    assert "No such option: --rundir" in refused("run", campaign_files.config, "--rundir", "x")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("*.safetensors", "holds no weights"),
        ("config.json", "holds no config.json"),
        ("tokenizer*", "holds no tokenizer"),
    ],
)
def test_a_model_directory_that_lacks_a_part_is_refused(
    missing: str, said: str, campaign_files: Any, write_config: Any, refused: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(campaign_files.model, model, ignore=shutil.ignore_patterns(missing))
    message = refused("run", write_config(model={"path": str(model)}), "--run-dir", tmp_path / "run")
    assert f"{model} {said}" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_architecture"}'])
def test_a_model_config_that_cannot_be_used_is_refused(
    content: str, campaign_files: Any, write_config: Any, refused: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(campaign_files.model, model)
    (model / "config.json").write_text(content)
    assert str(model) in refused("run", write_config(model={"path": str(model)}), "--run-dir", tmp_path / "run")


def test_a_corrupt_parquet_shard_of_the_pool_is_named(write_config: Any, refused: Any, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for index in range(3):
        table = pa.table({"question": [f"Question {index}?"], "answers": [[str(index)]], "subject": ["x"]})
        pq.write_table(table, pool / f"part-{index}.parquet")
    damaged = pool / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    message = refused("run", write_config(pool={"path": str(pool)}), "--run-dir", tmp_path / "run")
    assert f"{damaged} is not a readable Parquet file" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["run", "probe"])
def test_a_directory_that_holds_a_run_is_not_written_over(
    command: str, campaign_files: Any, refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("name: precious\n")
    before = contents(tmp_path)
    message = refused(command, campaign_files.config, "--run-dir", tmp_path)
    assert f"{tmp_path} holds a run already" in message
    assert f"ka2l resume {tmp_path}" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["resume", "status", "report"])
def test_a_directory_without_a_run_is_refused(command: str, refused: Any, tmp_path: Path) -> None:
    assert f"{tmp_path}/none holds no run" in refused(command, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_in_use_is_refused(campaign_files: Any, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(campaign_files.config.read_text())
    with RunDirectory(tmp_path).lock():
        before = contents(tmp_path)
        assert f"{tmp_path} is in use by another ka2l process" in refused("resume", tmp_path)
        assert contents(tmp_path) == before


def test_a_damaged_config_of_a_run_is_named(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: [")
    assert f"{tmp_path}/config.yaml is not valid YAML" in refused("resume", tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--redo-from", "tuning"], "no stage is called 'tuning' Stages: questions, references, corpus, observe"),
        (["--redo-from", "tune", "--round", "7"], "has no round 7"),
        (["--redo-from", "tune", "--round", "-1"], "has no round -1"),
    ],
)
def test_a_stage_that_is_not_there_cannot_be_made_again(
    words: list[str], said: str, campaign_files: Any, refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(campaign_files.config.read_text())
    assert said in refused("resume", tmp_path, *words)


# -- found once Ray runs -----------------------------------------------------------------------------------------------


@slow
def test_a_pool_without_a_usable_row_says_why_and_where_to_look(
    write_config: Any, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text(json.dumps({"question": " ", "answers": ["x"], "subject": "s"}) + "\n" + "not JSON\n")
    run_dir = tmp_path / "run"
    ended = ka2l("run", write_config(pool={"path": str(pool)}), "--run-dir", run_dir, *on_cluster)
    message = check(ended.returncode, ended.stderr)
    assert f"the pool '{pool}' has no usable row" in message
    assert f"{run_dir}/quarantine.parquet" in message
    reasons = pq.read_table(run_dir / "quarantine.parquet")["reason"].to_pylist()
    assert [reason.split(":")[0] for reason in reasons] == ["empty", "malformed"]
    assert not list(run_dir.glob("*/*/manifest.json"))


@slow
def test_a_budget_larger_than_the_pool_is_refused_before_anything_is_sampled(
    write_config: Any, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    config = write_config(selection={"budget": 31})
    ended = ka2l("run", config, "--run-dir", tmp_path / "run", *on_cluster)
    message = check(ended.returncode, ended.stderr)
    assert "the budget of 62 annotations (2 rounds x 31) is larger than the pool's 60 candidates" in message
    assert "selection.budget" in message
    assert not (tmp_path / "run" / "round-000").exists()


@slow
@pytest.mark.parametrize("stage", ["pool/questions", "round-000/extract", "round-001/tune"])
def test_a_damaged_committed_file_stops_the_run_and_is_left_as_it_is(
    stage: str, finished: Any, ka2l: Any, tmp_path: Path, on_cluster: list[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    victim = next(path for path in sorted((run_dir / stage).rglob("*")) if path.suffix in (".parquet", ".safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = contents(run_dir)
    ended = ka2l("resume", run_dir, *on_cluster)
    message = check(ended.returncode, ended.stderr)
    assert f"{victim} does not have the checksum in its manifest" in message
    assert f"--redo-from {stage.split('/')[1]}" in message
    assert of_stages(contents(run_dir)) == of_stages(before)


@slow
@pytest.mark.timeout(900)
def test_a_full_disk_stops_the_run_and_resume_goes_on_once_there_is_space(
    campaign_files: Any, finished: Any, ka2l: Any, small_disk: Path, on_cluster: list[str]
) -> None:
    run_dir = small_disk / "run"
    at_end = {"event": "stage_committed", "stage": "questions"}
    assert (
        ka2l("run", campaign_files.config, "--run-dir", run_dir, *on_cluster, kill=at_end).returncode == -signal.SIGKILL
    )
    before = contents(run_dir)
    # Room for the plan of the next stage and for a few of its six shards, which workers write.
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 5 * 4096)
    ended = ka2l("resume", run_dir, *on_cluster)
    message = check(ended.returncode, ended.stderr)
    assert f"no space left while writing {run_dir}/round-000/observe/part-" in message
    assert "ka2l resume" in message
    after = contents(run_dir)
    assert of_stages(before).items() <= of_stages(after).items()
    assert not [name for name in after if ".tmp-" in name]

    (small_disk / "filler").unlink()
    observed = {"event": "stage_committed", "stage": "observe"}
    assert ka2l("resume", run_dir, *on_cluster, kill=observed).returncode == -signal.SIGKILL
    ours, theirs = (RunDirectory(path).stage("observe", 0).table() for path in (run_dir, finished.run_dir))
    assert ours.equals(theirs)
