"""The config: what a user may write, and what is said about what may not be written."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from engine.config import RunConfig, dump_config, load_config, load_values, mask_secrets, parse_config, preset_names
from ka2l.errors import ConfigError
from ka2l.pool.config import ColumnsConfig
from ka2l.section import Section


def problem(text: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, "my.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- unknown keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "meant"),
    [
        ("round: 3", "round", "rounds"),
        ("sampler: {num_sample: 3}", "sampler.num_sample", "sampler.num_samples"),
        ("tuning: {adapter: {rank: 8, aplha: 4}}", "tuning.adapter.aplha", "tuning.adapter.alpha"),
        ("pool: {path: x, columns: {quesion: q}}", "pool.columns.quesion", "pool.columns.question"),
        ("tuning: {form: previous}", "tuning.form", "tuning.from"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_valid_name(text: str, path: str, meant: str) -> None:
    message = problem(text)
    assert message.startswith("my.yaml: ")
    assert f"unknown key {path!r}, did you mean {meant!r}?" in message
    assert "ka2l config" in message


def test_an_unknown_key_that_is_near_to_none_shows_all_that_are_valid() -> None:
    message = problem("labels: {xyzzy: 1}")
    assert "unknown key 'labels.xyzzy' (valid here: train, validation)" in message


def test_all_unknown_keys_are_named_at_once() -> None:
    message = problem("round: 3\nsampler: {num_sample: 3}")
    assert "'round'" in message
    assert "'sampler.num_sample'" in message


# -- wrong values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: many", "rounds: Input should be a valid integer"),
        ("rounds: -1", "rounds: Input should be greater than or equal to 0"),
        ("shard_rows: 0", "shard_rows: Input should be greater than or equal to 1"),
        ("sampler: {temperature: warm}", "sampler.temperature: Input should be a valid number"),
        ("selection: {budget: 0}", "selection.budget: Input should be greater than or equal to 1"),
        ("budget: {annotations: -5}", "budget.annotations: Input should be greater than or equal to 0"),
        ("sampler: 3", "sampler: Input should be a valid dictionary or instance of SamplerConfig"),
        ("probe: {kind: forest}", "probe: kind 'forest' is not one of linear, mlp, swiglu"),
        ("labels: {train: 0.9, validation: 0.2}", "leave nothing for the test split"),
        ("pool: {num_seed: 4}", "pool.path: Field required"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(text: str, said: str) -> None:
    assert said in problem(text)


@pytest.mark.parametrize("text", ["- a list", "just words", "3"])
def test_a_file_that_holds_no_keys_is_refused(text: str) -> None:
    assert "my.yaml must hold keys and values" in problem(text)


def test_yaml_that_does_not_parse_is_refused_with_its_line() -> None:
    message = problem("rounds: 3\n  sampler: {")
    assert "my.yaml is not valid YAML" in message
    assert "line 2" in message


def test_a_third_party_kind_is_accepted() -> None:
    assert parse_config("annotator: {kind: 'my_package.people:Crowd'}").annotator.kind == "my_package.people:Crowd"


# -- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rounds=5", "rounds", 5),
        ("tuning.learning_rate=1e-3", "tuning.learning_rate", 1e-3),
        ("tuning.adapter.r=4", "tuning.adapter.r", 4),
        ("extraction.layers=[1, -1]", "extraction.layers", [1, -1]),
        ("budget.annotations=null", "budget.annotations", None),
        ("model.trust_remote_code=true", "model.trust_remote_code", True),
        ("prompt.instruction=''", "prompt.instruction", ""),
        ("prompt.instruction=a=b", "prompt.instruction", "a=b"),
        ("pool.columns.group=subject", "pool.columns.group", "subject"),
        ("pool.columns={question: q, answers: a}", "pool.columns", ColumnsConfig(question="q", answers="a")),
        ("sampler.engine_args.seed=3", "sampler.engine_args", {"seed": 3}),
        ("tuning.from=previous", "tuning.start", "previous"),
    ],
)
def test_an_override_changes_one_key(override: str, path: str, value: Any) -> None:
    config = parse_config("pool: {path: questions.jsonl}", [override])
    changed: Any = config
    for name in path.split("."):
        changed = getattr(changed, name)
    assert changed == value
    assert config.pool.path == "questions.jsonl"


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    assert parse_config("rounds: 1", ["rounds=2", "rounds=4"]).rounds == 4


def test_an_override_keeps_the_neighbours_of_its_key() -> None:
    config = parse_config("sampler: {num_samples: 3, max_tokens: 5}", ["sampler.num_samples=7"])
    assert (config.sampler.num_samples, config.sampler.max_tokens) == (7, 5)


@pytest.mark.parametrize("override", ["rounds", "=3", "", "rounds:3"])
def test_an_override_of_the_wrong_form_is_refused(override: str) -> None:
    assert f"--set {override!r} is not of the form a.b=c" in problem("", override)


def test_an_unknown_key_in_an_override_is_refused_like_one_in_the_file() -> None:
    assert "did you mean 'selection.budget'?" in problem("", "selection.buget=5")
    assert "rounds: Input should be a valid integer" in problem("", "rounds.x=5")
    assert "prompt.instruction: Input should be a valid string" in problem("", "prompt.instruction=")


# -- files and presets -------------------------------------------------------------------------------------------------

#: The other presets are benchmarks of many runs, see test_matrix.py.
RUNS = [name for name in preset_names() if "models" not in load_values(name)]


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_loads(name: str) -> None:
    assert load_config(name).name == name


def test_a_benchmark_is_no_run() -> None:
    with pytest.raises(ConfigError, match=r"(?s)nine is a benchmark of many runs.*ka2l benchmark nine"):
        load_config("nine")


def test_a_config_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: é\nrounds: 1\n", encoding="utf-8")
    assert load_config(str(path), ["seed=9"]) == RunConfig(name="é", rounds=1, seed=9)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert load_config(str(tmp_path / "empty.yaml")) == RunConfig()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("quikstart", "no preset and no file named 'quikstart'; did you mean 'quickstart'?"),
        ("missing/file.yaml", "no preset and no file named 'missing/file.yaml'"),
    ],
)
def test_a_missing_file_is_named_and_presets_are_listed(source: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert said in str(caught.value)
    assert "Presets: " in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load_config(str(path))


# -- dumping -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_dumped_config_reads_back_equal(name: str) -> None:
    config = load_config(name, ["tuning.from=previous", "sampler.stop=['\\n', END]", "pool.columns.fact=null"])
    assert config.tuning.start == "previous"
    text = dump_config(config)
    assert parse_config(text) == config
    assert yaml.safe_load(text)["tuning"]["from"] == "previous"
    assert dump_config(parse_config(text)) == text


def test_secrets_are_masked_and_names_of_variables_are_not() -> None:
    values = {
        "api_key": "sk-1",
        "apiKey": "sk-2",
        "hf_token": "hf-3",
        "nested": [{"password": "p-4"}],
        "api_key_env": "OPENAI_API_KEY",
        "max_tokens": 64,
        "path": "s3://user:word@bucket/pool",
        "address": "ray://head:10001",
    }
    assert mask_secrets(values) == {
        "api_key": "***",
        "apiKey": "***",
        "hf_token": "***",
        "nested": [{"password": "***"}],
        "api_key_env": "OPENAI_API_KEY",
        "max_tokens": 64,
        "path": "s3://***@bucket/pool",
        "address": "ray://head:10001",
    }


def test_a_dumped_config_holds_no_secret() -> None:
    text = dump_config(
        parse_config("sampler: {engine_args: {hf_token: hf-very-secret}}\npool: {path: 's3://me:pw@b/x'}")
    )
    assert "secret" not in text
    assert "me:pw" not in text


# -- documentation -----------------------------------------------------------------------------------------------------


def sections(section: type[Section], path: str = "config") -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        for option in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(option) and issubclass(option, Section):
                yield from sections(option, f"{path}.{name}")


@pytest.mark.parametrize(("path", "section"), list(sections(RunConfig)), ids=lambda value: str(value))
def test_every_key_is_documented(path: str, section: type[Section]) -> None:
    assert (section.__doc__ or "").strip()
    missing = [name for name, field in section.model_fields.items() if not field.description]
    assert missing == [], f"{path} has keys without a docstring"
    unknown = section.LOGISTICS - section.model_fields.keys()
    assert not unknown, f"{path}.LOGISTICS names keys that it does not have"
    if section.KINDS:
        assert section.model_fields["kind"].annotation is str
