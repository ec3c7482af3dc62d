"""A finished run handed over: what is written is what was tuned and annotated, and its consumers can load it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from datasets import load_dataset
from greedy_tokens import greedy_tokens

from engine import launch
from engine.cli import benchmark, main
from engine.export.data import FORMATS
from engine.store.run_directory import RunDirectory
from engine.store.shards import shard_name, write_shard
from ka2l.model.loading import load_causal_lm, load_tokenizer
from ka2l.model.tokens import row_token_ids
from ka2l.prompts import plain_prompt
from ka2l.schemas import PAIRS

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[3]
#: A made-up secret.
TOKEN = "hf_" + "x" * 34


class Exported(NamedTuple):
    folder: Path
    stdout: str
    run: RunDirectory
    model: Path

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Of one format, as `datasets` loads them."""
        (file,) = self.folder.glob(f"data/{name}.*")
        loaded = load_dataset("json", data_files=str(file), cache_dir=str(self.folder.parent / "cache"), split="train")
        return loaded.to_list()

    def canary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "canary.json").read_text())
        return found


@pytest.fixture(scope="module")
def exported(finished: Any, ka2l: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Everything that can be exported of the finished campaign."""
    folder = tmp_path_factory.mktemp("export") / "mine"
    ended = ka2l("export", finished.run_dir, "--out", folder, "--merged")
    assert ended.returncode == 0, ended.stderr
    return Exported(folder, ended.stdout, RunDirectory(finished.run_dir), finished.files.model)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a `ka2l` command in this process; returns its exit code and what stdout and stderr say."""

    def run(*words: object) -> tuple[int, str, str]:
        def no_ray(*_: object) -> None:
            raise AssertionError("an export needs no cluster")

        for module in (main, benchmark, launch):
            monkeypatch.setattr(module, "RaySession", no_ray)
        monkeypatch.setattr(sys, "argv", ["ka2l", *map(str, words)])
        code = 0
        try:
            main.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Path:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return tmp_path / "run"


def annotated(run: RunDirectory) -> dict[str, dict[str, Any]]:
    tables = [run.stage("annotate", index).table().to_pylist() for index in (0, 1)]
    return {row["question_id"]: row | {"round": index} for index, rows in enumerate(tables) for row in rows}


def answers_of_the_run(exported: Exported) -> tuple[list[str], list[str]]:
    """Prompts of some eval questions, and what the last observation has the tuned model answer."""
    drawn = exported.run.stage("observe", 2).table(["question_id", "answer"], pc.field("purpose") == "eval")
    rows = drawn.sort_by("question_id").slice(0, 8).to_pylist()
    questions = exported.run.stage("questions").table(["question_id", "question"]).to_pylist()
    text_of = {row["question_id"]: row["question"] for row in questions}
    return [plain_prompt(text_of[row["question_id"]]) for row in rows], [row["answer"] for row in rows]


def texts(model: Any, folder: Path, prompts: list[str], max_tokens: int) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = greedy_tokens(model, [tokenizer(prompt)["input_ids"] for prompt in prompts], max_tokens)
    return [tokenizer.decode(tokens, skip_special_tokens=True).partition("\n")[0].strip() for tokens in made]


# -- the adapter -------------------------------------------------------------------------------------------------------


def test_the_adapter_s_files_are_those_that_the_last_round_committed(exported: Exported) -> None:
    committed = Path(exported.run.stage("tune", 1).path) / "adapter"
    for file in committed.iterdir():
        assert (exported.folder / file.name).read_bytes() == file.read_bytes()


def test_the_adapter_loads_in_plain_peft_and_answers_as_in_the_run(exported: Exported) -> None:
    from peft import PeftModel

    base = load_causal_lm(str(exported.model), "float32")
    prompts, expected = answers_of_the_run(exported)
    assert texts(base, exported.model, prompts, 4) != expected
    model = PeftModel.from_pretrained(base, exported.folder).eval()
    assert texts(model, exported.model, prompts, 4) == expected
    canary = exported.canary()
    longest = max(map(len, canary["peft_tokens"]))
    assert greedy_tokens(model, canary["prompt_token_ids"], longest) == canary["peft_tokens"]


def test_the_merged_model_loads_in_plain_transformers_and_answers_as_in_the_run(exported: Exported) -> None:
    from transformers import AutoModelForCausalLM

    merged = exported.folder / "merged"
    prompts, expected = answers_of_the_run(exported)
    assert texts(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), merged, prompts, 4) == expected


@pytest.mark.whole
def test_the_printed_command_is_one_of_vllm_s_and_the_adapter_answers_there_as_in_the_run(
    exported: Exported, tmp_path: Path
) -> None:
    canary = exported.canary()
    (said,) = [line for line in exported.stdout.splitlines() if "vllm serve" in line]
    longest = max(map(len, canary["peft_tokens"]))
    job = {"command": said.strip(), "prompt_token_ids": canary["prompt_token_ids"], "max_tokens": longest}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = str(Path(__file__).with_name("vllm_serve_answers.py"))
    with (tmp_path / "log.txt").open("w") as log:
        status = subprocess.run(
            [sys.executable, script, "job.json", "out.json"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
    assert status == 0, (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {"host": "127.0.0.1", "answers": {"mini": canary["peft_tokens"]}}


@pytest.mark.parametrize("beside", [True, False], ids=["merged beside the adapter", "instead of an adapter"])
def test_a_whole_model_that_the_run_has_written_is_handed_over_as_it_is(
    beside: bool, copy: Path, command: Any, exported: Exported
) -> None:
    from transformers import AutoModelForCausalLM

    become_whole(copy, exported.model, beside)
    words = ["--merged"] if beside else []
    code, out, err = command("export", copy, "--out", copy.parent / "out", "--format", "alpaca", *words)
    assert code == 0, err
    place = copy.parent / "out" / ("merged" if beside else "")
    model = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    prompts, expected = answers_of_the_run(exported)
    assert texts(model, exported.model, prompts, 4) != expected  # the model put there is the base model
    assert (place / "model.safetensors").read_bytes() == (exported.model / "model.safetensors").read_bytes()
    assert (copy.parent / "out/adapter_config.json").exists() == beside
    assert beside or f"vllm serve {copy.parent / 'out'} " in out
    card = huggingface_hub.ModelCard.load(copy.parent / "out/README.md")
    assert card.data.library_name == ("peft" if beside else "transformers")


def become_whole(run_dir: Path, model: Path, beside: bool) -> None:
    """A run whose last round has written a whole model, and as such a model the one it began with."""
    stage = RunDirectory(run_dir).stage("tune", 1)
    tuned = stage.require()
    folder = run_dir / "round-001/tune"
    shutil.copytree(model, folder / "model")
    (folder / "adapter/canary.json").rename(folder / "model/canary.json")
    if not beside:
        shutil.rmtree(folder / "adapter")
    (folder / "manifest.json").unlink()
    stage.begin("made up", tuned.config, {})
    stage.commit(wanted="made up", config=tuned.config, inputs={}, metrics={}, cost={}, seed=0, seconds=0.0)


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_each_row_says_where_it_comes_from(exported: Exported, name: str) -> None:
    rows = exported.rows(name)
    given = annotated(exported.run)
    for row in rows:
        source = given[row["question_id"]]
        assert (row["annotator"], row["round"]) == (source["annotator"], source["round"])
        said = json.dumps(row)
        assert source["question"] in said
        assert source["answers"][0] in said
    assert f"{name}: {len(rows):,} rows" in exported.stdout
    if name == "preference":
        assert {row["part"] for row in rows} == {"own_answer"}
    else:
        assert [row["question_id"] for row in rows] == by_round(given)


def by_round(given: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(given, key=lambda name: (given[name]["round"], name))


def test_alpaca_and_sharegpt_hold_question_and_answer_alone(exported: Exported) -> None:
    first = annotated(exported.run)[by_round(annotated(exported.run))[0]]
    alpaca, sharegpt = exported.rows("alpaca")[0], exported.rows("sharegpt")[0]
    asked = (first["question"], "", first["answers"][0])
    assert (alpaca["instruction"], alpaca["input"], alpaca["output"]) == asked
    turns = [(turn["from"], turn["value"]) for turn in sharegpt["conversations"]]
    assert turns == [("human", first["question"]), ("gpt", first["answers"][0])]


def test_worse_answers_are_what_the_base_model_said_and_was_graded_wrong(exported: Exported) -> None:
    graded = {row["question_id"]: row for row in exported.run.stage("feedback", 2).table().to_pylist()}
    wrong = {name for name in annotated(exported.run) if name in graded and graded[name]["correct"] is False}
    rows = {row["question_id"]: row for row in exported.rows("preference")}
    assert rows.keys() == {name for name in wrong if graded[name]["top_answer"].strip()} != set()
    for name, row in rows.items():
        assert row["rejected"] == f" {graded[name]['top_answer'].strip()}"
        assert row["chosen"] == f" {annotated(exported.run)[name]['answers'][0]}"


def test_trl_tunes_a_step_on_prompt_completion_and_sees_the_run_s_own_tokens(
    exported: Exported, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=load_causal_lm(str(exported.model), "float32"),
        args=SFTConfig(**trl_arguments(tmp_path)),
        train_dataset=dataset(exported, "prompt_completion", tmp_path),
        processing_class=tokenizer_of(exported),
    )
    row, expected = trainer.train_dataset[0], exported.rows("prompt_completion")[0]
    prompt, answer = row_token_ids(tokenizer_of(exported), expected["prompt"], expected["completion"], chat=False)
    assert row["input_ids"] == prompt + answer
    assert [label for label in row["labels"] if label != -100] == answer
    assert trainer.train().global_step == 1


def test_trl_compares_a_step_on_preference(exported: Exported, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=load_causal_lm(str(exported.model), "float32"),
        args=DPOConfig(**trl_arguments(tmp_path)),
        train_dataset=dataset(exported, "preference", tmp_path),
        processing_class=tokenizer_of(exported),
    )
    row, expected = trainer.train_dataset[0], exported.rows("preference")[0]
    for side in ("chosen", "rejected"):
        prompt, answer = row_token_ids(tokenizer_of(exported), expected["prompt"], expected[side], chat=False)
        assert (row["prompt_ids"], row[f"{side}_ids"]) == (prompt, answer)
    assert trainer.train().global_step == 1


def trl_arguments(folder: Path) -> dict[str, Any]:
    arguments = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": []}
    return arguments | {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "disable_tqdm": True}


def dataset(exported: Exported, name: str, folder: Path) -> Any:
    (file,) = exported.folder.glob(f"data/{name}.*")
    return load_dataset("json", data_files=str(file), cache_dir=str(folder / "cache"), split="train")


def tokenizer_of(exported: Exported) -> Any:
    from ka2l.model.loading import ModelConfig

    return load_tokenizer(ModelConfig(path=str(exported.model)))


def test_what_knowtuning_made_is_exported_with_the_answers_it_was_made_of(copy: Path, command: Any) -> None:
    become_knowtuning(copy)
    code, out, err = command("export", copy, "--out", copy.parent / "out", "--round", 0, "--format", "preference",
                             "--format", "prompt_completion")  # fmt: skip
    assert code == 0, err
    assert "preference: 1 rows" in out
    (pair,) = [json.loads(line) for line in (copy.parent / "out/data/preference.jsonl").read_text().splitlines()]
    asked = {"prompt": plain_prompt("Which?"), "chosen": " One. Two.", "rejected": " Two."}
    assert pair.items() >= (asked | {"part": "completeness", "annotator": "reference", "round": 0}).items()
    rows = [json.loads(line) for line in (copy.parent / "out/data/prompt_completion.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["part"] == "fine_grained"] == [plain_prompt("Which of both?")]
    assert len(rows) == 12 + 1
    mark = json.loads((copy.parent / "out/export.json").read_text())
    assert (mark["stage"], mark["whole_model"]) == ("compare", None)
    assert "Comparisons by completeness: 1" in (copy.parent / "out/README.md").read_text()


def become_knowtuning(run_dir: Path) -> None:
    """A run whose first round has compared answers: the pairs are made up, the adapter is the one that was tuned."""
    run = RunDirectory(run_dir)
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    values["tuning"]["kind"] = "knowtuning"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    name = run.stage("annotate", 0).table(["question_id"])["question_id"][0].as_py()
    fine = {"part": "fine_grained", "question": "Which of both?", "better": "Two.", "worse": None}
    whole = {"part": "completeness", "question": "Which?", "better": "One. Two.", "worse": "Two."}
    rows = [{"question_id": name} | fine, {"question_id": name} | whole]
    augment = run.stage("augment", 0)
    write_shard(augment.url, shard_name(0), pa.Table.from_pylist(rows, schema=PAIRS), {})
    tuned = run.stage("tune", 0).require()
    shutil.copytree(run_dir / "round-000/tune/adapter", run_dir / "round-000/compare/adapter")
    for stage in (augment, run.stage("compare", 0)):
        stage.begin("made up", tuned.config, {})
        stage.commit(wanted="made up", config=tuned.config, inputs={}, metrics={}, cost={}, seed=0, seconds=0.0)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_is_one_of_the_hub_s_and_says_what_the_run_says(exported: Exported, finished: Any) -> None:
    card = huggingface_hub.ModelCard.load(exported.folder / "README.md")
    assert card.data.base_model == exported.model.name
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    for row in summary["rounds"]:
        low, high = row["accuracy_ci"]
        assert f"| {row['num_annotated']} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] |" in card.text
    assert "Annotated: 24, by reference (24)" in card.text
    assert "**Licence of the base model:** Unknown" in card.text
    assert "Question: {question}\nAnswer:\n```" in card.text
    assert exported.run.stage("tune", 1).require().fingerprint in card.text


def test_the_card_shows_what_was_measured_beside_accuracy(copy: Path, command: Any, tmp_path: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    summary["rounds"][0]["evaluation"] = {"facts": {"correct": [2.5, 2.0, 3.0], "order": None}, "text": {}}
    measured = {"mean": [0.5, 0.4, 0.6], "how": "nltk"}
    summary["rounds"][2]["evaluation"] = {"facts": {"correct": [3.5, 3.0, 4.0]}, "text": {"meteor": measured}}
    (copy / "summary.json").write_text(json.dumps(summary))
    code, _, err = command("export", copy, "--out", tmp_path / "out", "--format", "alpaca")
    assert code == 0, err
    card = (tmp_path / "out/README.md").read_text()
    assert "| facts correct an answer | 2.500 [2.000, 3.000] | 3.500 [3.000, 4.000] |" in card
    assert "| METEOR |  | 0.500 [0.400, 0.600] |" in card
    assert "| order |" not in card


def test_the_card_names_no_folder_of_this_machine(exported: Exported, finished: Any) -> None:
    text = (exported.folder / "README.md").read_text()
    for folder in (finished.run_dir, exported.model.parent, exported.folder.parent):
        assert str(folder) not in text


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: l2\nlicense_link: https://x.y\n---\n", "other (l2), https://x.y"),
        ("config.json", '{"license": "mit"}', "mit, says its config.json"),
        ("README.md", "---\nlicense: [\n---\n", "Unknown"),
    ],
)  # fmt: skip
def test_the_base_model_s_licence_is_what_its_files_say(file: str, content: str, expected: str, tmp_path: Path) -> None:
    from engine.export.card import base_licence

    (tmp_path / file).write_text(content)
    assert expected in base_licence(str(tmp_path)).sentence


# -- where from, where to ----------------------------------------------------------------------------------------------


def test_a_run_behind_a_url_gives_the_same_files(exported: Exported, command: Any, tmp_path: Path) -> None:
    code, _, err = command("export", f"file://{exported.run.path}", "--out", tmp_path / "out", "--format", "alpaca")
    assert code == 0, err
    for name in ("adapter_model.safetensors", "data/alpaca.json"):
        assert (tmp_path / "out" / name).read_bytes() == (exported.folder / name).read_bytes()
    assert not (tmp_path / "out/data/sharegpt.json").exists()


def test_an_earlier_round_is_exported_with_what_was_annotated_by_then(
    exported: Exported, command: Any, tmp_path: Path
) -> None:
    code, out, err = command("export", exported.run.path, "--out", tmp_path / "out", "--round", 0)
    assert code == 0, err
    assert "alpaca: 12 rows" in out
    adapter = Path(exported.run.stage("tune", 0).path) / "adapter/adapter_model.safetensors"
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == adapter.read_bytes()
    assert "after round 1" not in (tmp_path / "out/README.md").read_text()


def test_an_export_is_replaced_only_when_asked_and_nothing_else_is(
    exported: Exported, command: Any, tmp_path: Path
) -> None:
    words = ("export", exported.run.path, "--out", tmp_path / "out", "--format", "alpaca")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("my only copy")
    code, _, err = command(*words)
    assert code == 2
    assert "is not empty" in err
    code, _, err = command(*words, "--overwrite")
    assert code == 2
    assert "holds something other than an export" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out/thesis.tex").unlink()
    assert command(*words)[0] == 0
    (tmp_path / "out/old").write_text("")
    assert command(*words)[0] == 2
    assert command(*words, "--overwrite")[0] == 0
    assert not (tmp_path / "out/old").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing_behind(
    exported: Exported, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ka2l.errors import CanaryError

    def refuse(*_: object) -> None:
        raise CanaryError("The merged weights do not answer as the adapter does.")

    monkeypatch.setattr("ka2l.model.merging.check_merged", refuse)
    code, out, err = command("export", exported.run.path, "--out", tmp_path / "out", "--merged")
    assert code == 1
    assert "do not answer as the adapter does" in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_run_without_an_adapter_is_told_to_go_on(selected: Path, command: Any) -> None:
    code, _, err = command("export", selected)
    assert code == 2
    assert "has tuned an adapter yet" in err
    assert f"ka2l resume {selected}" in err


def test_an_unfinished_run_is_told_how_to_finish_or_what_to_take(copy: Path, command: Any) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"status": "paused"}))
    code, _, err = command("export", copy)
    assert code == 2
    assert "is not finished: paused" in err
    assert f"ka2l resume {copy}" in err
    assert "--round 1" in err
    assert command("export", copy, "--round", 1, "--out", copy.parent / "out", "--format", "alpaca")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--round", "7"], "These have one: 0, 1."),
        (["--format", "csv"], "Formats: alpaca, sharegpt, prompt_completion, preference."),
        (["--base", "/no/such/model", "--merged"], "--base DIR"),
        (["--public"], "--push-to-hub ORG/NAME"),
        (["--push-to-hub", "no-slash"], "Give ORG/NAME"),
        (["--out", "s3://bucket/out"], "not a local folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    words: list[str], expected: str, exported: Exported, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("export", exported.run.path, *words)
    assert code == 2
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_another_base_model_is_refused_and_a_missing_one_is_told(
    exported: Exported, command: Any, tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("export", exported.run.path, "--out", tmp_path / "out", "--format", "alpaca")
    code, _, err = command(*words, "--base", tiny_models("qwen2.5"))
    assert code == 2
    assert "was tuned on another base model than" in err
    code, _, err = command(*words, "--base", tmp_path / "gone")
    assert code == 0
    assert "The base model was not looked at" in err


def test_only_a_campaign_is_exported(exported: Exported, command: Any, copy: Path, tmp_path: Path) -> None:
    assert "holds no run" in command("export", tmp_path)[2]
    (tmp_path / "matrix.yaml").write_text("")
    assert "holds a benchmark" in command("export", tmp_path)[2]
    (copy / "mode").write_text("probe")
    assert "tunes nothing" in command("export", copy)[2]


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """What the hub's client would be told; no network."""

    def __init__(self, *, public: bool = False, refuses: str | None = None) -> None:
        self.public, self.refuses = public, refuses
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: set[str] = set()

    def client(self, token: str) -> Any:
        assert token == TOKEN
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.calls.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def model_info(self, _: str) -> Any:
        private = not self.public and self.calls[-1][1]["private"]
        return type("Info", (), {"private": private})

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], **_: Any) -> None:
        files = [str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file()]
        self.uploaded = set(huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(**options: Any) -> Hub:
        made = Hub(**options)
        monkeypatch.setattr(huggingface_hub, "HfApi", made.client)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        return made

    return make


def test_nothing_is_pushed_unasked(exported: Exported, command: Any, hub: Any, tmp_path: Path) -> None:
    made = hub()
    assert command("export", exported.run.path, "--out", tmp_path / "out", "--format", "alpaca")[0] == 0
    assert made.calls == []


def test_a_push_is_private_and_leaves_the_data_at_home(
    exported: Exported, command: Any, hub: Any, tmp_path: Path
) -> None:
    made = hub()
    code, out, err = command("export", exported.run.path, "--out", tmp_path / "out", "--push-to-hub", "org/mine")
    assert code == 0, err
    assert made.calls == [("org/mine", {"private": True, "exist_ok": True})]
    assert made.uploaded == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "pushed: https://hub/org/mine" in out
    assert '"org/mine"' in (tmp_path / "out/README.md").read_text()
    assert TOKEN not in out + err


def test_a_push_is_public_only_when_asked(exported: Exported, command: Any, hub: Any, tmp_path: Path) -> None:
    words = ("export", exported.run.path, "--out", tmp_path / "out", "--overwrite", "--push-to-hub", "org/mine")
    made = hub(public=True)
    code, _, err = command(*words)
    assert code == 2
    assert "is public already" in err
    assert made.uploaded == set()
    assert command(*words, "--public")[0] == 0
    assert made.calls[-1] == ("org/mine", {"private": False, "exist_ok": True})
    assert made.uploaded


def test_what_the_hub_says_is_told_without_the_token(
    exported: Exported, command: Any, hub: Any, tmp_path: Path
) -> None:
    hub(refuses=f"403: {TOKEN} may not write")
    words = ("export", exported.run.path, "--out", tmp_path / "out", "--format", "alpaca", "--push-to-hub", "org/mine")
    code, out, err = command(*words)
    assert code == 2
    assert "403: *** may not write" in err
    assert TOKEN not in out + err
    assert (tmp_path / "out/README.md").exists()


def test_without_a_token_nothing_is_begun(
    exported: Exported, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, err = command("export", exported.run.path, "--out", tmp_path / "out", "--push-to-hub", "org/mine")
    assert code == 2
    assert "HF_TOKEN" in err
    assert not (tmp_path / "out").exists()
