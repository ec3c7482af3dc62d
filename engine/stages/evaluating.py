"""Evaluates a model state beside accuracy: wording, facts, aspects, calibration. No other stage reads it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.annotation import annotators
from engine.stages.choosing import annotation_context, teacher_workers
from engine.stages.kind import Outcome, Work, declare
from engine.stages.tables import among, annotated_ids, by_id, eval_grades, facts_asked
from engine.store.shards import shard_name, write_shard
from engine.store.stage_folder import Stage
from ka2l.evaluation.config import Confidence, agreement, confidence_figures, text_figures, text_scores
from ka2l.evaluation.facts import FactCounts, compare_facts, counts_by_testbed, counts_of, fact_metrics, win_rates
from ka2l.evaluation.judge import AnswerJudge, Comparison, JudgedAnswer, JudgedPair
from ka2l.model.loading import model_name
from ka2l.schemas import EVALUATED
from ka2l.seeds import row_seed
from ka2l.teacher.structured import Refused
from ka2l.tuning.knowtuning import ASPECTS, Aspect

if TYPE_CHECKING:
    from engine.execution.campaign import Campaign

#: Answers that the judge is asked about together.
_JUDGED_TOGETHER = 64

Rows = dict[str, dict[str, Any]]


@declare("measuring", closes=True, is_leaf=True)
def evaluate(campaign: Campaign, round_index: int) -> Work:
    """Figures of the greedy answers to eval questions, and of what claims to know how far they can be trusted.

    Where it was made with other settings it is made again: no other stage reads it but those of later rounds.
    """
    graded, known = campaign.stage("cluster", round_index), campaign.stage("knowledge", round_index)
    inputs = [campaign.stage("questions"), campaign.stage("references"), graded]
    if known.manifest() is not None:  # the closing observation judges no states
        inputs.append(known)
    if round_index:
        inputs += [campaign.stage("cluster", 0), campaign.stage("evaluate", 0)]

    def work(stage: Stage) -> Outcome:
        metrics, cost, rows = _measure(campaign, stage, round_index)
        table = [{"question_id": name} | row for name, row in rows.items()]
        write_shard(stage.url, shard_name(0), pa.Table.from_pylist(table, schema=EVALUATED), {})
        return {"num_eval": len(rows)} | metrics, cost

    return Work(_fields(campaign), inputs, work)


def _fields(campaign: Campaign) -> dict[str, Any]:
    """What changes the figures: the settings, and which weights judge and compare, never where they lie."""
    config = campaign.config.evaluation
    fields = config.result_fields()
    if config.encoder is not None:
        fields["encoder"] = model_name(config.encoder)
    if config.judges:
        teacher = campaign.config.annotator.teacher
        assert teacher is not None
        fields["teacher"] = teacher.result_fields()
        if config.judge == "local_teacher":
            fields["teacher"]["model"] = model_name(teacher.model)
    return fields


def _measure(campaign: Campaign, stage: Stage, round_index: int) -> tuple[dict[str, Any], dict[str, float], Rows]:
    """Metrics, cost and what is known of each eval question."""
    config, seed = campaign.config.evaluation, campaign.config.seed
    answer_of = _greedy_answers(campaign, round_index)
    ids = sorted(answer_of)
    rows: Rows = {name: {} for name in ids}
    accepted = by_id(campaign.stage("references").table(["question_id", "answers"], among(ids)), "answers")
    scores = text_scores(config, [answer_of[name] for name in ids], [accepted[name] for name in ids])
    for metric, made in scores.items():
        for name, value in zip(ids, made.values, strict=True):
            rows[name][metric] = value
    metrics: dict[str, Any] = {"text": text_figures(scores, seed)}
    reference_of = {name: accepted[name][0] for name in ids}
    counts: dict[str, FactCounts] = {}
    if config.facts == "testbed":
        found = {name: counts_by_testbed(answer_of[name], reference_of[name]) for name in ids}
        counts = {name: made for name, made in found.items() if made is not None}
    cost: dict[str, float] = {}
    verdicts = _Verdicts()
    if config.judges and ids:
        verdicts, metrics["judge"], cost = _judge(campaign, stage, round_index, answer_of, reference_of)
        counts |= verdicts.counts
    for name, made_counts in counts.items():
        rows[name] |= made_counts._asdict()
    for name, outcomes in verdicts.outcomes.items():
        rows[name] |= {str(aspect): outcome for aspect, outcome in outcomes.items()}
    if config.facts != "none":
        metrics["facts"] = fact_metrics(list(counts.values()), seed)
    metrics["aspects"] = _aspects(campaign, round_index, counts, verdicts)
    metrics["confidence"] = confidence_figures(_confidences(campaign, round_index))
    return metrics, cost, rows


def _greedy_answers(campaign: Campaign, round_index: int) -> dict[str, str]:
    graded = campaign.stage("cluster", round_index)
    return by_id(graded.table(["question_id", "top_answer"], pc.field("purpose") == "eval"), "top_answer")


def _aspects(
    campaign: Campaign, round_index: int, counts: Mapping[str, FactCounts], verdicts: _Verdicts
) -> dict[str, Any]:
    """Wins, ties and losses against the base model's answers, by counted facts and by the judge."""
    if not round_index:
        return {}
    seed = campaign.config.seed
    rates = {}
    if counts:
        before = counts_of(campaign.stage("evaluate", 0).table().to_pylist())
        both = sorted(counts.keys() & before.keys())
        rates["by_facts"] = win_rates([compare_facts(counts[name], before[name]) for name in both], seed)
    if verdicts.outcomes:
        rates["by_judge"] = win_rates(list(verdicts.outcomes.values()), seed)
    return rates


# -- a judge ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answer_judge(campaign: Campaign, round_index: int) -> Iterator[AnswerJudge]:
    config = campaign.config
    with contextlib.ExitStack() as ended:
        placement = ended.enter_context(teacher_workers(campaign, local=config.evaluation.judge == "local_teacher"))
        judge = annotators.answer_judge(config, annotation_context(campaign, round_index, {}, placement))
        ended.callback(judge.close)
        yield judge


@dataclass
class _Verdicts:
    """What a judge has said so far, by question."""

    counts: dict[str, FactCounts] = field(default_factory=dict)
    outcomes: dict[str, dict[Aspect, int]] = field(default_factory=dict)
    """Against the base model's answer."""
    same: Counter[Aspect] = field(default_factory=Counter)
    """How often both positions had the same verdict."""
    refused: Counter[str] = field(default_factory=Counter)

    def add_counts(self, name: str, made: FactCounts | Refused | None) -> None:
        if isinstance(made, Refused):
            self.refused[f"facts: {made.reason}"] += 1
        elif made is not None:
            self.counts[name] = made

    def add_comparison(self, name: str, made: Comparison | Refused | None) -> None:
        if isinstance(made, Refused):
            self.refused[f"pairs: {made.reason}"] += 1
        elif made is not None:
            self.outcomes[name] = made.outcomes
            self.same.update(aspect for aspect, agreed in made.agreed.items() if agreed)


def _judge(
    campaign: Campaign, stage: Stage, round_index: int, answer_of: Mapping[str, str], reference_of: Mapping[str, str]
) -> tuple[_Verdicts, dict[str, Any], dict[str, float]]:
    """Verdicts, metrics and cost. The journal keeps every reply, so that after a kill nothing is paid for again."""
    config, seed = campaign.config.evaluation, campaign.config.seed
    ids = sorted(answer_of, key=lambda name: row_seed(seed, 0, "judged", name))[: config.num_judged]
    text_of = by_id(campaign.stage("questions").table(["question_id", "question"], among(ids)), "question")
    before = _greedy_answers(campaign, 0) if config.pairs == "judge" and round_index else {}
    # The round is part of a prompt's id: what was paid for in another round is not counted again.
    named = {name: f"{stage.label}/{name}" for name in ids}
    verdicts = _Verdicts()
    with (
        _answer_judge(campaign, round_index) as judge,
        campaign.events.progress(stage.label, len(ids), "answers") as progress,
    ):
        for batch in (ids[start : start + _JUDGED_TOGETHER] for start in range(0, len(ids), _JUDGED_TOGETHER)):
            if config.facts == "judge":
                asked = {
                    named[name]: JudgedAnswer(text_of[name], answer_of[name], reference_of[name]) for name in batch
                }
                made = judge.count(asked)
                for name in batch:
                    verdicts.add_counts(name, made.get(named[name]))
            pairs = {
                named[name]: JudgedPair(text_of[name], reference_of[name], answer_of[name], before[name])
                for name in batch
                if name in before
            }
            compared = judge.compare(pairs)
            for name in batch:
                verdicts.add_comparison(name, compared.get(named[name]))
            progress.advance(len(batch))
            if judge.stopped:
                break
        usage, stopped = judge.usage, judge.stopped
    num_pairs = len(verdicts.outcomes)
    said = {
        "num_asked": len(ids),
        "refused": dict(verdicts.refused.most_common(10)),
        "stopped": stopped,
        "same_in_both_positions": {name: verdicts.same[name] / num_pairs for name in ASPECTS} if num_pairs else None,
    }
    return verdicts, said, usage.cost_items()


# -- confidence -------------------------------------------------------------------------------------------------------


def _confidences(campaign: Campaign, round_index: int) -> dict[str, Confidence]:
    """What claims to know whether greedy answers to eval questions are right: 1 - P(unknown) of this state's probe,
    how far this state's sampled answers agree, and 1 - P(wrong) of the base model's answers.

    P(wrong) was learnt from annotated questions, so eval questions about their facts are left out there.
    """
    graded, known = campaign.stage("cluster", round_index), campaign.stage("knowledge", round_index)
    correct = eval_grades(campaign, round_index)
    found: dict[str, Confidence] = {}
    if known.manifest() is not None:
        table = known.table(["question_id", "p_unknown", "p_wrong"], pc.field("split") == "eval")
        found["p_unknown"] = _confidence({name: 1 - p for name, p in by_id(table, "p_unknown").items()}, correct)
        p_wrong = {name: 1 - p for name, p in by_id(table, "p_wrong").items() if p is not None}
        if p_wrong:
            bought = annotated_ids(campaign, round_index)
            questions = campaign.stage("questions")
            told = set(questions.table(["fact"], among(bought))["fact"].to_pylist()) - {None}
            fact_of, _ = facts_asked(campaign, p_wrong)
            p_wrong = {name: p for name, p in p_wrong.items() if fact_of[name] not in told}
            found["p_wrong"] = _confidence(p_wrong, eval_grades(campaign, 0))
    drawn = graded.table(["question_id", "semantic_ids"], pc.field("purpose") == "agreement")
    if drawn.num_rows:
        shares = {name: agreement(clusters) for name, clusters in by_id(drawn, "semantic_ids").items()}
        found["agreement"] = _confidence(shares, correct)
    return found


def _confidence(of_right: Mapping[str, float], correct: Mapping[str, bool]) -> Confidence:
    both = sorted(of_right.keys() & correct.keys())
    return Confidence([of_right[name] for name in both], [correct[name] for name in both])
