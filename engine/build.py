"""The only place where a ``kind:`` becomes an object. Called inside the workers, so heavy imports stay local."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ka2l.annotation.annotator import AnnotatorConfig
from ka2l.answers.equivalence import (
    EmbeddingEquivalence,
    Equivalence,
    EquivalenceConfig,
    LexicalEquivalence,
    NLIEquivalence,
)
from ka2l.errors import ConfigError
from ka2l.knowledge.extraction_config import ExtractionConfig
from ka2l.model.loading import ModelConfig, load_tokenizer, model_name
from ka2l.prompts import PromptConfig, Prompter
from ka2l.sampling.sampler import Sampler, SamplerConfig, TransformersSampler
from ka2l.selection.strategies import STRATEGIES, SelectionConfig, Strategy

if TYPE_CHECKING:
    from actors.extractor import ExtractorHost, PerplexityHost, QuestionPerplexityHost
    from actors.sampler import ObservePlan, SamplerHost
    from actors.scorer import ScorerHost
    from actors.teacher import TeacherHost
    from actors.workers.shared import EquivalenceHost
    from ka2l.knowledge.perplexity import PerplexityScorer


def plugin(kind: str) -> Any:
    """The object that ``module:Class`` names; raises ConfigError where it cannot be imported."""
    module, _, name = kind.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot load {kind!r}: {error}", hint="The module must be importable on every node."
        ) from error


def sampler(model: ModelConfig, config: SamplerConfig, adapter: str | None = None) -> Sampler:
    """The sampler of ``sampler.kind``, with the model loaded."""
    from actors.host import set_num_threads

    set_num_threads(config.cpus_per_replica)
    match config.kind:
        case "vllm":
            from actors.sampler import VLLMSampler

            factory: Any = VLLMSampler
        case "transformers":
            factory = TransformersSampler
        case kind:
            factory = plugin(kind)
    made: Sampler = factory(
        model.source,
        config,
        dtype=_dtype(model, config.gpus_per_replica),
        adapter=adapter,
        trust_remote_code=model.trust_remote_code,
    )
    return made


def _dtype(model: ModelConfig, gpus: float) -> str:
    """``auto`` is float32 on CPUs for every engine: vLLM and transformers would differ on a bfloat16 checkpoint."""
    return "float32" if model.dtype == "auto" and gpus == 0 else model.dtype


def sampler_host(
    model: ModelConfig,
    prompt: PromptConfig,
    config: SamplerConfig,
    plan: ObservePlan,
    adapter: str | None,
    canary: Mapping[str, Any] | None,
) -> SamplerHost:
    """What the observe stage runs."""
    from actors.sampler import SamplerHost

    made = sampler(model, config, adapter)
    return SamplerHost(made, Prompter(load_tokenizer(model), prompt), config, plan, canary)


def extractor_host(
    model: ModelConfig, prompt: PromptConfig, config: ExtractionConfig, adapter: str | None
) -> ExtractorHost:
    """What the extract stage runs."""
    from actors.extractor import ExtractorHost
    from actors.host import set_num_threads
    from ka2l.knowledge.hidden_states import HiddenStateExtractor

    set_num_threads(config.cpus_per_replica)
    extractor = HiddenStateExtractor(
        model.source,
        config,
        dtype=_dtype(model, config.gpus_per_replica),
        adapter=adapter,
        trust_remote_code=model.trust_remote_code,
    )
    return ExtractorHost(extractor, Prompter(load_tokenizer(model), prompt), config)


def perplexity_host(
    model: ModelConfig, prompt: PromptConfig, config: ExtractionConfig, adapter: str | None, given_question: bool
) -> PerplexityHost:
    """What the difficulty stage runs."""
    from actors.extractor import PerplexityHost

    scorer = _perplexity_scorer(model, config, adapter)
    return PerplexityHost(scorer, Prompter(load_tokenizer(model), prompt), given_question=given_question)


def question_perplexity_host(
    model: ModelConfig, prompt: PromptConfig, config: ExtractionConfig, adapter: str | None
) -> QuestionPerplexityHost:
    """What the perplexity stage runs."""
    from actors.extractor import QuestionPerplexityHost

    return QuestionPerplexityHost(_perplexity_scorer(model, config, adapter), Prompter(load_tokenizer(model), prompt))


def _perplexity_scorer(model: ModelConfig, config: ExtractionConfig, adapter: str | None) -> PerplexityScorer:
    from actors.host import set_num_threads
    from ka2l.knowledge.perplexity import PerplexityScorer

    set_num_threads(config.cpus_per_replica)
    return PerplexityScorer(
        model.source,
        dtype=_dtype(model, config.gpus_per_replica),
        adapter=adapter,
        trust_remote_code=model.trust_remote_code,
        batch_size=config.batch_size,
        device=config.device,
    )


def equivalence(config: EquivalenceConfig) -> Equivalence:
    """The equivalence of ``equivalence.kind``."""
    match config.kind:
        case "lexical":
            return LexicalEquivalence()
        case "nli":
            assert config.model is not None
            return NLIEquivalence(config.model, config.batch_size, config.device, config.trust_remote_code)
        case "embedding":
            assert config.model is not None
            return EmbeddingEquivalence(
                config.model, config.threshold, config.batch_size, config.device, config.trust_remote_code
            )
        case "judge":
            return judge(config)
        case kind:
            made: Equivalence = plugin(kind)(config)
            return made


def judge(config: EquivalenceConfig) -> Equivalence:
    """An LLM as judge: an OpenAI-compatible endpoint where one is given, else a local vLLM model."""
    from actors.scorer import EndpointJudge, SamplerJudge
    from ka2l.answers.equivalence import JudgeEquivalence

    assert config.model is not None
    if config.endpoint is not None:
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise ConfigError(
                f"environment variable {config.api_key_env} is empty", hint="equivalence.api_key_env names it."
            )
        return JudgeEquivalence(EndpointJudge(config.endpoint, config.model, key))
    model = ModelConfig(path=config.model, trust_remote_code=config.trust_remote_code)
    made = sampler(model, SamplerConfig(max_tokens=4))
    return JudgeEquivalence(SamplerJudge(made, load_tokenizer(model)))


def scorer_host(config: EquivalenceConfig, shared: Equivalence | None, stopped_early: bool) -> ScorerHost:
    """What the cluster stage runs; with ``shared`` it loads no model of its own."""
    from actors.scorer import ScorerHost

    return ScorerHost(shared or equivalence(config), stopped_early=stopped_early)


def feedback_host(
    config: EquivalenceConfig, shared: Equivalence | None, answers: Mapping[str, list[str]]
) -> ScorerHost:
    """What the feedback stage runs: own answers to candidates grouped by meaning, and graded where annotated."""
    from actors.scorer import ScorerHost

    return ScorerHost(shared or equivalence(config), ("rehearsal",), answers)


def equivalence_host(config: EquivalenceConfig) -> EquivalenceHost:
    """What runs share that compare answers with the same model."""
    from actors.workers.shared import EquivalenceHost

    return EquivalenceHost(equivalence(config))


def strategy(config: SelectionConfig) -> Strategy:
    """The query strategy of ``selection.kind``."""
    found: Strategy = STRATEGIES[config.kind] if config.kind in STRATEGIES else plugin(config.kind)
    return found


def teacher_host(config: AnnotatorConfig) -> TeacherHost:
    """What a local teacher's workers host."""
    from actors.teacher import TeacherHost

    assert config.teacher is not None
    path, engine = config.teacher.model, config.engine
    model = ModelConfig(path=path, dtype=engine.dtype, trust_remote_code=engine.trust_remote_code)
    fields = engine.model_dump(exclude={"dtype", "trust_remote_code"})
    made = sampler(model, SamplerConfig(**fields, max_tokens=config.teacher.max_tokens, stop=()))
    return TeacherHost(made, load_tokenizer(model), model_name(path))
