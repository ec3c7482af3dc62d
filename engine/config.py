"""RunConfig: composed of the sections that the modules own; YAML presets or files, plus ``--set a.b=c``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from actors.workers.faults import FaultsConfig
from engine.forecast.prices import PricesConfig
from ka2l.annotation.annotator import AnnotatorConfig
from ka2l.answers.equivalence import EquivalenceConfig
from ka2l.decoder.config import DecoderConfig
from ka2l.errors import ConfigError
from ka2l.evaluation.config import EvaluationConfig
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.knowledge.labels import LabelsConfig
from ka2l.knowledge.probe import ProbeConfig
from ka2l.model.loading import ModelConfig
from ka2l.pool.config import PoolConfig
from ka2l.prompts import PromptConfig
from ka2l.sampling.sampler import SamplerConfig
from ka2l.section import Section
from ka2l.selection.strategies import SelectionConfig
from ka2l.testbed.build import TestbedConfig
from ka2l.tuning.sft import TuningConfig

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class BudgetConfig(Section):
    """Caps. The run stops cleanly before one is passed."""

    annotations: int | None = Field(None, ge=0)
    """Most annotations over all rounds; null for rounds x selection.budget."""
    money: float | None = Field(None, ge=0)
    """Most that annotation may cost over all rounds, in the currency of the annotator's price table."""
    hours: float | None = Field(None, gt=0)
    """Most hours that the run may work, over all attempts. A round that would not end in time, by what the last one
    took, is not begun; what takes longer than foreseen is stopped. `ka2l resume --set budget.hours=...` goes on."""


class StoppingConfig(Section):
    """When further rounds are not worth their annotations. A rule that is null never ends a run."""

    unknown_share: float | None = Field(None, gt=0, lt=1)
    """End where less than this share of the candidates left is predicted unknown, and less than it answered wrongly."""
    gain: float | None = Field(None, gt=0, lt=1)
    """End where the last round has raised accuracy on eval questions by less than this."""


class RayConfig(Section):
    """Where the run's workers live."""

    address: str = "auto"
    """``auto`` joins a running cluster, else starts Ray here; ``local`` always starts it here; or an address."""
    num_cpus: int | None = Field(None, ge=1)
    """CPU cores to use when Ray is started here; null for all."""
    release_timeout_s: float = Field(120.0, ge=0)
    """Seconds to wait for a stage's CPUs and GPUs to come free before the next stage gives up."""


class RunConfig(Section):
    """Everything about a run."""

    LOGISTICS: ClassVar[frozenset[str]] = frozenset({"name", "prices", "faults", "ray", "trackers"})

    name: str = "run"
    """Names the run directory ``runs/NAME`` where none is given."""
    seed: int = 0
    """All randomness derives from it."""
    rounds: int = Field(3, ge=0)
    """Rounds of probe, select, annotate, tune; one more observation closes the run."""
    shard_rows: int = Field(512, ge=1)
    """Questions a shard: the grain of work, of commit and of resume."""
    model: ModelConfig = ModelConfig()
    """The model under study."""
    testbed: TestbedConfig = TestbedConfig()
    """The built-in world, used where model.path or pool.path says ``testbed``."""
    pool: PoolConfig = PoolConfig(path="testbed")
    """The questions."""
    prompt: PromptConfig = PromptConfig()
    """How they are asked."""
    sampler: SamplerConfig = SamplerConfig()
    """How answers are sampled."""
    equivalence: EquivalenceConfig = EquivalenceConfig()
    """When two answers mean the same."""
    labels: LabelsConfig = LabelsConfig()
    """From entropy to known/unknown."""
    extraction: ExtractionConfig = ExtractionConfig()
    """Which hidden states are kept."""
    probe: ProbeConfig = ProbeConfig()
    """The classifier on hidden states."""
    selection: SelectionConfig = SelectionConfig()
    """What is annotated next."""
    decoder: DecoderConfig = DecoderConfig()
    """New questions from hidden states."""
    annotator: AnnotatorConfig = AnnotatorConfig()
    """Who answers."""
    tuning: TuningConfig = TuningConfig()
    """How the adapter is tuned."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured beside accuracy."""
    budget: BudgetConfig = BudgetConfig()
    """Caps."""
    stopping: StoppingConfig = StoppingConfig()
    """When it is enough."""
    prices: PricesConfig = PricesConfig()
    """What the report's net saving reckons with."""
    faults: FaultsConfig = FaultsConfig()
    """What is done about workers and questions that fail."""
    trackers: list[TrackerName] = Field(default_factory=list)
    """Who is told of rounds and training steps: ``tensorboard``, ``wandb``, ``mlflow``."""
    ray: RayConfig = RayConfig()
    """Where workers live."""

    @property
    def annotation_cap(self) -> int:
        """Most annotations of the whole run."""
        wanted = self.rounds * self.selection.budget
        return wanted if self.budget.annotations is None else min(wanted, self.budget.annotations)

    def has_feedback(self, round_index: int) -> bool:
        """Whether a round has the stage ``feedback``: all later ones, and the first where own answers are drawn."""
        return round_index > 0 or (self.rounds > 0 and self.tuning.num_own_answers > 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.tuning.adapter.served(self.sampler.kind)  # raises where it is not
        if self.evaluation.facts == "testbed" and not (self.pool.path == "testbed" and self.testbed.lives):
            raise ValueError(
                "evaluation.facts testbed counts facts of the testbed's lives: set testbed.lives, or judge"
            )
        if self.evaluation.judges and self.annotator.teacher is None:
            raise ValueError("evaluation asks a judge: name it by annotator.teacher")
        return self


def preset_names() -> list[str]:
    """Names of the presets that come with KA2L."""
    files = resources.files("engine.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_config(source: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a preset by name or a YAML file by path, apply ``a.b=c`` overrides and validate.

    Raises:
        ConfigError: no such preset or file, YAML that does not parse, an unknown key, a wrong value.
    """
    values = load_values(source, overrides)
    if "models" in values:
        raise ConfigError(f"{source} is a benchmark of many runs", hint=f"Run it: ka2l benchmark {source}")
    return validated(values, source)


def load_values(source: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a preset or YAML file with overrides applied, not validated; raises ConfigError."""
    if source in preset_names():
        text = resources.files("engine.presets").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} cannot be read: {error}", hint="A config is a YAML file in UTF-8.") from None
    else:
        near = difflib.get_close_matches(source, preset_names(), 1)
        raise ConfigError(
            f"no preset and no file named {source!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"Presets: {', '.join(preset_names())}. A file is given by its path.",
        )
    return parse_values(text, overrides, source)


def parse_config(text: str, overrides: Iterable[str] = (), source: str = "config") -> RunConfig:
    """Validate a YAML text, with overrides applied; raises ConfigError."""
    return validated(parse_values(text, overrides, source), source)


def parse_values(text: str, overrides: Iterable[str], source: str) -> dict[str, Any]:
    """Keys and values of a YAML text with overrides applied, not validated; raises ConfigError."""
    try:
        merged = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}", hint="Check indentation and quotes.") from None
    if not isinstance(merged, dict):
        raise ConfigError(f"{source} must hold keys and values", hint="See `ka2l config quickstart` for an example.")
    for override in overrides:
        _apply_override(merged, override)
    return merged


def validated(values: Mapping[str, Any], source: str) -> RunConfig:
    """A run's config of these values; raises ConfigError that names ``source``."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems), hint="`ka2l config` shows every key.") from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, with secrets masked."""
    values = mask_secrets(config.model_dump(mode="json", by_alias=True))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_SECRET = re.compile(r"(api_?key|token|password|secret|credential)s?$", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def mask_secrets(value: Any, key: str = "") -> Any:
    """Replace values of secret-looking keys, and user names and passwords in URLs, by ``***``."""
    if isinstance(value, Mapping):
        return {name: mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [mask_secrets(item, key) for item in value]
    if isinstance(value, str):
        return "***" if _SECRET.search(key) else _USERINFO.sub("***@", value)
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r} is not of the form a.b=c", hint="For example --set selection.budget=200")
    *parents, leaf = path.strip().split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        node[parent] = child = child if isinstance(child, dict) else {}
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[leaf] = text


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] != "extra_forbidden":
        return f"{path or 'config'}: {problem['msg'].removeprefix('Value error, ')}"
    names = _valid_names(location[:-1])
    near = difflib.get_close_matches(location[-1], names, 1, cutoff=0.5)
    suggestion = f", did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
    return f"unknown key {path!r}{suggestion} (valid here: {', '.join(names)})"


def _valid_names(parents: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for parent in parents:
        field = next((f for name, f in model.model_fields.items() if parent in (name, f.alias)), None)
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]
