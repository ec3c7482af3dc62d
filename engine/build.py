"""The only place where a ``kind:`` becomes an object. Called inside the workers, so heavy imports stay local."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.faults import FaultsConfig
from ka2l.annotation import Annotator, AnnotatorConfig, ReferenceAnnotator
from ka2l.equivalence import EmbeddingEquivalence, Equivalence, EquivalenceConfig, LexicalEquivalence, NLIEquivalence
from ka2l.errors import ConfigError
from ka2l.hidden_states import ExtractionConfig
from ka2l.models import ModelConfig, load_tokenizer, model_name
from ka2l.prompts import PromptConfig, Prompter
from ka2l.sampling import Sampler, SamplerConfig, TransformersSampler
from ka2l.selection import STRATEGIES, SelectionConfig, Strategy

if TYPE_CHECKING:
    from actors.extractor import ExtractorHost, PerplexityHost, QuestionPerplexityHost
    from actors.metrics import Tags
    from actors.placement import Placement
    from actors.pool import HostPool
    from actors.sampler import ObservePlan, SamplerHost
    from actors.scorer import ScorerHost
    from actors.shared import EquivalenceHost
    from actors.teacher import TeacherHost
    from engine.artifacts import RunDirectory
    from engine.config import RunConfig
    from ka2l.annotation_human import Task
    from ka2l.answer_judge import AnswerJudge
    from ka2l.knowledge_writer import KnowledgeWriter
    from ka2l.perplexity import PerplexityScorer


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
    from ka2l.hidden_states import HiddenStateExtractor

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
    from ka2l.perplexity import PerplexityScorer

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
    from ka2l.equivalence import JudgeEquivalence

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
    from actors.shared import EquivalenceHost

    return EquivalenceHost(equivalence(config))


def strategy(config: SelectionConfig) -> Strategy:
    """The query strategy of ``selection.kind``."""
    found: Strategy = STRATEGIES[config.kind] if config.kind in STRATEGIES else plugin(config.kind)
    return found


def _teacher_annotator(config: AnnotatorConfig, context: AnnotationContext, *, local: bool) -> Annotator:
    from engine.teachers import asked_teacher
    from ka2l.annotation_teacher import TeacherAnnotator

    asked = asked_teacher(config, context, local=local, batch_api=config.batch_api)
    made = TeacherAnnotator(asked.config, asked.ask, equivalence(context.equivalence), asked.close)
    made.batch_size = asked.batch_size
    return made


def knowledge_writer(config: RunConfig, context: AnnotationContext) -> KnowledgeWriter:
    """Who takes annotated answers apart for ``tuning.kind: knowtuning``: ``tuning.knowtuning.writer``."""
    kind = config.tuning.knowtuning.writer
    if kind == "testbed":
        from ka2l.testbed_lives import LifeWriter

        return LifeWriter(config.testbed, config.seed)
    from engine.teachers import asked_teacher
    from ka2l.knowledge_writer import TeacherWriter

    asked = asked_teacher(config.annotator, context, local=kind == "local_teacher")
    made = TeacherWriter(asked.config, asked.ask, asked.close)
    made.batch_size = asked.batch_size
    return made


def answer_judge(config: RunConfig, context: AnnotationContext) -> AnswerJudge:
    """The judge of ``evaluation.facts`` and ``evaluation.pairs``: what annotator.teacher names."""
    from engine.teachers import asked_teacher
    from ka2l.answer_judge import AnswerJudge

    asked = asked_teacher(config.annotator, context, local=config.evaluation.judge == "local_teacher")
    return AnswerJudge(asked.config, asked.ask, asked.close)


def teacher_host(config: AnnotatorConfig) -> TeacherHost:
    """What a local teacher's workers host."""
    from actors.teacher import TeacherHost

    assert config.teacher is not None
    path, engine = config.teacher.model, config.engine
    model = ModelConfig(path=path, dtype=engine.dtype, trust_remote_code=engine.trust_remote_code)
    fields = engine.model_dump(exclude={"dtype", "trust_remote_code"})
    made = sampler(model, SamplerConfig(**fields, max_tokens=config.teacher.max_tokens, stop=()))
    return TeacherHost(made, load_tokenizer(model), model_name(path))


class AnnotationContext(NamedTuple):
    """What an annotator may need of the run."""

    run: RunDirectory
    round_index: int
    reveal: Callable[[Sequence[str]], Mapping[str, list[str]]]
    """Looks up reference answers of question ids."""
    reference_table: str | None
    """File of further questions with answers."""
    make_tasks: Callable[[Sequence[str]], list[Task]]
    """What people are shown of question ids."""
    equivalence: EquivalenceConfig
    money: float | None
    """Most that the whole run may spend on annotation."""
    run_seed: int
    log_path: str
    """Where the annotator's workers write their chatter."""
    placement: Placement
    """Of the annotator's workers."""
    faults: FaultsConfig
    tags: Tags | None = None
    """Of their metrics."""
    shared_teacher: HostPool | None = None
    """Of a benchmark's cells: a local teacher's workers, which others ask, too."""


def annotator(config: AnnotatorConfig, context: AnnotationContext) -> Annotator:
    """The annotator of ``annotator.kind``."""
    match config.kind:
        case "reference":
            from ka2l.reference_table import read_reference_table

            table = None
            if context.reference_table is not None:
                table = read_reference_table(context.reference_table, config.reference_similarity)
            return ReferenceAnnotator(context.reveal, table)
        case "teacher":
            return _teacher_annotator(config, context, local=False)
        case "local_teacher":
            return _teacher_annotator(config, context, local=True)
        case "human":
            from engine.human import HumanAnnotator

            return HumanAnnotator(
                context.run,
                context.round_index,
                config.task_format,
                context.make_tasks,
                equivalence(context.equivalence),
            )
        case kind:
            made: Annotator = plugin(kind)(config)
            return made
