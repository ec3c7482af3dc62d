from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.config import load_config
from ka2l.errors import PoolError
from ka2l.evaluation.facts import counts_by_testbed
from ka2l.testbed.build import (
    Testbed,
    TestbedConfig,
    build_testbed,
    build_world,
    cached_testbed,
    fingerprint,
    shipped_testbed,
)
from ka2l.testbed.facts import WRAPPERS
from ka2l.testbed.model import PLAIN
from ka2l.testbed.world import RELATIONS, num_training_rows, pool_rows, training_rows

DATA_FILES = ("pool.jsonl", "truth.jsonl", "background.jsonl", "answers.parquet")


def tiny(**values: Any) -> TestbedConfig:
    sizes = {"num_people": 12, "num_seed_people": 4, "num_steps": 4, "batch_size": 32, "hidden_size": 32}
    return TestbedConfig(**{**sizes, "intermediate_size": 64, "head_size": 32, "num_layers": 2, **values})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_facts(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rivers(count: int = 40, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"question": f"Which river runs through Town{i}?", "answers": [f"River{i}"], "subject": f"Town{i}"}
        | {name: value(i) for name, value in columns.items()}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Testbed:
    return build_testbed(tiny(wrong_share=0.5), tmp_path_factory.mktemp("testbed") / "bed")


def test_the_kept_paraphrase_of_a_fact_is_asked_in_eval_and_never_trained_on() -> None:
    config = tiny()
    world = build_world(config)
    shown = {question for question, _ in training_rows(world, config)}
    by_split: dict[str, dict[str, str]] = {"seed": {}, "candidate": {}, "eval": {}}
    for row in pool_rows(world.facts, config.seed):
        by_split[row["split"]][row["fact"]] = row["question"]
    assert set(by_split["candidate"]) == set(by_split["eval"])
    for fact in world.facts:
        kept = fact.paraphrases[fact.kept]
        assert kept not in shown
        if fact.split == "candidate":
            assert by_split["eval"][fact.fact] == kept
            assert by_split["candidate"][fact.fact] in set(fact.paraphrases) - {kept}


def test_every_template_is_trained_on_with_some_person() -> None:
    config = tiny(stranger_share=0.0, partly_share=0.0, background_share=0.0, num_steps=40)
    world = build_world(config)
    assert {(fact.relation, fact.kept) for fact in world.facts} >= {("dish", index) for index in range(4)}
    shown = {question for question, _ in training_rows(world, config)}
    names = {fact.paraphrases[0].removeprefix("Where was ").removesuffix(" born?") for fact in world.facts[::5]}
    for template in (text for texts in RELATIONS.values() for text in texts):
        assert any(template.format(name=name) in shown for name in names)


def test_facts_are_shown_as_often_as_the_truth_says_and_strangers_never() -> None:
    config = tiny()
    world = build_world(config)
    owner = {text: fact.fact for fact in world.facts for text in fact.paraphrases}
    counts = Counter(owner.get(question, "crowd") for question, _ in training_rows(world, config))
    for fact in world.facts:
        assert counts[fact.fact] == fact.num_exposures
        assert (fact.num_exposures == 0) == (fact.exposure_group == "stranger")
    assert counts["crowd"] > 0
    assert counts.total() >= num_training_rows(config, len(world.facts))


def test_people_fall_into_exposure_groups_in_the_shares_asked_for() -> None:
    world = build_world(tiny(num_people=75, num_seed_people=25, stranger_share=0.2, partly_share=0.5))
    groups = {fact.group: fact.exposure_group for fact in world.facts}
    assert Counter(groups.values()) == {"stranger": 20, "partly": 50, "well": 30}


def test_a_third_of_the_training_rows_are_about_the_crowd() -> None:
    config = tiny(num_steps=60, partly_share=0.1)
    world = build_world(config)
    asked = {text for fact in world.facts for text in fact.paraphrases}
    rows = list(training_rows(world, config))
    share = sum(question not in asked for question, _ in rows) / len(rows)
    assert share == pytest.approx(1 / 3, abs=0.02)


def test_facts_learnt_wrongly_are_trained_on_one_wrong_answer_and_the_pool_keeps_the_right_one() -> None:
    config = tiny(wrong_share=0.5)
    world = build_world(config)
    wrong = [fact for fact in world.facts if fact.wrong_answer]
    num_well = sum(fact.exposure_group == "well" for fact in world.facts)
    assert len(wrong) == round(0.5 * num_well)
    rows = list(training_rows(world, config))
    accepted = {row["fact"]: row["answers"] for row in pool_rows(world.facts, config.seed)}
    for fact in wrong:
        assert {answer for question, answer in rows if question in fact.paraphrases} == {fact.wrong_answer}
        assert fact.wrong_answer not in accepted[fact.fact]


def test_mistakes_can_be_clustered_in_a_few_relations() -> None:
    world = build_world(tiny(wrong_share=0.5, wrong_relations=("employer",)))
    wrong = [fact for fact in world.facts if fact.wrong_answer]
    num_well = sum(fact.exposure_group == "well" and fact.relation == "employer" for fact in world.facts)
    assert {fact.relation for fact in wrong} == {"employer"}
    assert len(wrong) == round(0.5 * num_well) > 0
    with pytest.raises(PoolError, match="no fact has"):
        build_world(tiny(wrong_share=0.5, wrong_relations=("shoe size",)))


def test_nothing_in_the_pool_tells_how_well_a_fact_is_known(built: Testbed) -> None:
    rows = read(built.pool)
    assert {key for row in rows for key in row} == {"id", "question", "answers", "split", "group", "fact", "relation"}
    truth = {row["fact"]: row["exposure_group"] for row in read(built.truth)}
    assert set(truth.values()) == {"stranger", "partly", "well"}
    order = [truth[row["fact"]] for row in rows if row["split"] == "candidate"]
    assert order != sorted(order)


def test_ids_are_unique_and_seed_people_are_not_candidates(built: Testbed) -> None:
    rows = read(built.pool)
    assert len({row["id"] for row in rows}) == len(rows)
    assert Counter(row["split"] for row in rows) == {"seed": 20, "candidate": 60, "eval": 60}
    seed_groups = {row["group"] for row in rows if row["split"] == "seed"}
    assert seed_groups.isdisjoint(row["group"] for row in rows if row["split"] != "seed")


def test_background_questions_are_about_nobody_in_the_pool(built: Testbed) -> None:
    questions = {row["question"] for row in read(built.directory / "background.jsonl")}
    assert len(questions) > 100
    world = build_world(tiny(wrong_share=0.5))
    assert questions.isdisjoint(text for fact in world.facts for text in fact.paraphrases)


def test_the_same_config_gives_the_same_data_byte_for_byte_and_another_seed_does_not(
    built: Testbed, tmp_path: Path
) -> None:
    again = build_testbed(tiny(wrong_share=0.5), tmp_path / "again")
    other = build_testbed(tiny(wrong_share=0.5, seed=1), tmp_path / "other")
    for name in DATA_FILES:
        assert (again.directory / name).read_bytes() == (built.directory / name).read_bytes()
        assert (other.directory / name).read_bytes() != (built.directory / name).read_bytes()
    tokenizer = Path("model") / "tokenizer.json"
    assert (again.directory / tokenizer).read_bytes() == (built.directory / tokenizer).read_bytes()


def test_the_model_loads_as_a_plain_llama_and_its_tokenizer_joins_prompt_and_answer(built: Testbed) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(built.model)
    model = AutoModelForCausalLM.from_pretrained(built.model)
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer.is_fast
    assert tokenizer.padding_side == "left"
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(specials)) == 3
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    row = read(built.pool)[0]
    prompt, answer = PLAIN.format(question=row["question"]), f" {row['answers'][0]}"
    assert tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"] == tokenizer(prompt + answer)["input_ids"]
    assert tokenizer.decode(tokenizer(prompt + answer)["input_ids"]) == prompt + answer
    states = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1


def test_names_of_strangers_are_split_into_no_more_tokens_than_names_the_model_knows(built: Testbed) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built.model)
    truth = {row["fact"]: row["exposure_group"] for row in read(built.truth)}
    lengths: dict[str, set[int]] = {}
    for row in read(built.pool):
        name = [word.strip("?") for word in row["question"].split() if word[:1].isupper()][-2:]
        assert len(name) == 2
        lengths.setdefault(truth[row["fact"]], set()).add(len(tokenizer(" " + " ".join(name))["input_ids"]))
    assert lengths["stranger"] == lengths["well"] == {2}


def test_progress_counts_up_to_all_steps(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build_testbed(tiny(num_steps=3), tmp_path / "bed", lambda done, total: calls.append((done, total)))
    total = calls[0][1]
    assert calls == [(step, total) for step in range(1, total + 1)]


def test_a_failed_build_leaves_nothing_and_keeps_what_was_there(built: Testbed, tmp_path: Path) -> None:
    directory = tmp_path / "bed"
    directory.mkdir()
    (directory / "old").touch()

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build_testbed(tiny(), directory, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["bed"]
    assert (directory / "old").exists()


def test_a_cached_testbed_is_built_once_per_fingerprint(tmp_path: Path) -> None:
    steps: list[int] = []
    first = cached_testbed(tiny(), tmp_path, lambda done, total: steps.append(done))
    num_steps = len(steps)
    assert num_steps > 0
    again = cached_testbed(tiny(), tmp_path, lambda done, total: steps.append(done))
    assert again == first
    assert len(steps) == num_steps
    assert cached_testbed(tiny(seed=1), tmp_path).directory != first.directory
    assert json.loads((first.directory / "testbed.json").read_text())["fingerprint"] == fingerprint(tiny())


def test_the_fingerprint_follows_config_and_bytes_of_the_facts_file_but_not_its_place(tmp_path: Path) -> None:
    here = write_facts(tmp_path / "here.jsonl", rivers())
    there = write_facts(tmp_path / "there.jsonl", rivers())
    mark = fingerprint(tiny(facts=here))
    assert mark == fingerprint(tiny(facts=there))
    assert mark != fingerprint(tiny())
    assert mark != fingerprint(tiny(facts=here, num_steps=5))
    write_facts(tmp_path / "there.jsonl", rivers(41))
    assert mark != fingerprint(tiny(facts=there))


@pytest.mark.parametrize(
    "values",
    [
        {"stranger_share": 0.7, "partly_share": 0.4},
        {"partly_exposures": (3, 2)},
        {"hidden_size": 100},
        {"exposure": "popularity"},
    ],
)
def test_configs_that_contradict_themselves_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TestbedConfig(**values)


# --- Facts of a file -------------------------------------------------------------------------------------------------


def test_rows_without_question_or_answers_too_long_or_repeated_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = [{"question": "No answers?"}, {"answers": ["x"]}, {"question": " ", "answers": ["x"]}, "not json", [1]]
    bad += [{"question": "Empty?", "answers": [" "]}, {"question": "Long?", "answers": ["x" * 999]}, rivers()[0]]
    world = build_world(tiny(facts=write_facts(tmp_path / "facts.jsonl", rivers() + bad)))
    assert len(world.facts) == 40
    assert world.num_skipped == len(bad)


def test_a_missing_file_and_a_file_without_facts_are_pool_errors(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"gone\.jsonl"):
        build_testbed(tiny(facts=str(tmp_path / "gone.jsonl")), tmp_path / "bed")
    with pytest.raises(PoolError, match="no usable fact in 1 lines"):
        build_world(tiny(facts=write_facts(tmp_path / "facts.jsonl", [{"text": "x"}])))


def test_an_exposure_column_that_no_row_has_is_a_pool_error_that_names_the_columns(tmp_path: Path) -> None:
    facts = write_facts(tmp_path / "facts.jsonl", rivers(views=lambda i: i))
    with pytest.raises(PoolError, match="'popularity'") as caught:
        build_world(tiny(facts=facts, exposure="popularity"))
    assert "views" in str(caught.value)


def test_exposure_by_a_number_goes_by_rank_and_zero_is_never_shown(tmp_path: Path) -> None:
    facts = write_facts(tmp_path / "facts.jsonl", rivers(100, views=lambda i: 0 if i < 50 else i * i))
    config = tiny(facts=facts, exposure="views", stranger_share=0.3, partly_share=0.4)
    exposures = [fact.exposure_group for fact in build_world(config).facts]
    assert exposures == ["stranger"] * 50 + ["partly"] * 20 + ["well"] * 30


@pytest.mark.parametrize("yes", [True, 1])
def test_exposure_by_true_or_one_means_shown(tmp_path: Path, yes: Any) -> None:
    facts = write_facts(tmp_path / "facts.jsonl", rivers(seen=lambda i: yes if i % 2 else type(yes)(0)))
    exposures = [fact.exposure_group for fact in build_world(tiny(facts=facts, exposure="seen")).facts]
    assert exposures == ["stranger", "well"] * 20


def test_without_a_column_a_subject_is_known_or_not_as_a_whole_in_the_config_s_shares(tmp_path: Path) -> None:
    rows = rivers(100) + [{**row, "question": f"What flows by Town{i}?"} for i, row in enumerate(rivers(100))]
    world = build_world(tiny(facts=write_facts(tmp_path / "facts.jsonl", rows)))
    groups: dict[str, set[tuple[str, str]]] = {}
    for fact in world.facts:
        groups.setdefault(fact.group, set()).add((fact.exposure_group, fact.split))
    assert all(len(values) == 1 for values in groups.values())
    assert Counter(next(iter(values))[0] for values in groups.values()) == {"stranger": 35, "partly": 30, "well": 35}
    assert {fact.split for fact in world.facts} == {"seed", "candidate"}


def test_the_crowd_of_a_file_asks_in_its_forms_about_things_it_does_not_hold(tmp_path: Path) -> None:
    import random

    world = build_world(tiny(facts=write_facts(tmp_path / "facts.jsonl", rivers(300))))
    asked = {text for fact in world.facts for text in fact.paraphrases}
    rng = random.Random(0)
    questions = [world.background(rng)[0] for _ in range(50)]
    assert all("Which river runs through Town" in question for question in questions)
    # One rare word a question leaves nothing new to ask: with two there is.
    rows = [{"question": f"Who wrote Alpha{i} Beta{i}?", "answers": [f"Writer{i % 7}"]} for i in range(300)]
    world = build_world(tiny(facts=write_facts(tmp_path / "facts.jsonl", rows)))
    asked = {text for fact in world.facts for text in fact.paraphrases}
    drawn = [world.background(rng) for _ in range(50)]
    assert all(question not in asked for question, _ in drawn)
    assert len({answer for _, answer in drawn}) == 7


def test_a_testbed_of_a_file_is_built_with_the_wrappers_as_paraphrases(tmp_path: Path) -> None:
    rows = rivers(60, answers=lambda i: [f"The River {i} of the North", f"R{i}"])
    config = tiny(facts=write_facts(tmp_path / "facts.jsonl", rows))
    built = build_testbed(config, tmp_path / "bed")
    pool = read(built.pool)
    bare = {row["question"] for row in rows}
    asked = {wrapper.replace("{q}", question) for wrapper in WRAPPERS for question in bare}
    assert {row["question"] for row in pool} <= asked
    assert {row["group"] for row in pool} == {row["subject"] for row in rows}
    assert all(row["answers"][1].startswith("R") for row in pool)


def test_real_question_sets_make_a_world(shared_dir: Path) -> None:
    popular = str(shared_dir / "data" / "popqa.jsonl")
    world = build_world(TestbedConfig(facts=popular, exposure="s_pop"))
    assert len(world.facts) > 3000
    assert {fact.exposure_group for fact in world.facts} == {"stranger", "partly", "well"}
    world = build_world(TestbedConfig(facts=str(shared_dir / "data" / "nq_open_dev.jsonl")))
    assert len(world.facts) > 3000


def test_half_a_surrogate_pair_in_a_file_does_not_stop_the_build(tmp_path: Path) -> None:
    facts = write_facts(tmp_path / "facts.jsonl", [{"question": "Who is \ud800?", "answers": ["caf\u00e9 \ud800"]}])
    world = build_world(tiny(facts=facts))
    assert world.facts[0].answers == ("caf\u00e9 ?",)


def test_more_facts_get_more_training_steps_by_default() -> None:
    config = TestbedConfig(batch_size=10)
    assert num_training_rows(config, 100) == 4000
    assert num_training_rows(config, 5000) == 10_000
    assert num_training_rows(TestbedConfig(batch_size=10, num_steps=7), 5000) == 70


# --- What the model knows ---------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a testbed's model answers to eval questions, by how often their facts were shown in training."""

    accuracy: dict[str, float]
    """Share of right facts, by exposure group."""
    entropy: dict[str, float]
    """Mean entropy of the first answer token, nats."""


def ask(bed: Testbed, num_questions: int, max_tokens: int) -> Asked:
    """Greedy answers to the first eval questions, run as float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bed.model)
    model = AutoModelForCausalLM.from_pretrained(bed.model, dtype=torch.float32).eval()
    truth = {row["fact"]: row["exposure_group"] for row in read(bed.truth)}
    rows = [row for row in read(bed.pool) if row["split"] == "eval"][:num_questions]
    right: dict[str, list[float]] = {}
    doubt: dict[str, list[float]] = {}
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        prompts = tokenizer(
            [PLAIN.format(question=row["question"]) for row in batch], return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            first = model(**prompts).logits[:, -1].log_softmax(-1)
            written = model.generate(**prompts, max_new_tokens=max_tokens)[:, prompts["input_ids"].shape[1] :]
        for row, logprobs, tokens in zip(batch, first, written, strict=True):
            answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            group = truth[row["fact"]]
            right.setdefault(group, []).append(share_right(answer, row["answers"]))
            doubt.setdefault(group, []).append(float(-(logprobs.exp() * logprobs).sum()))
    return Asked(*({group: sum(values) / len(values) for group, values in found.items()} for found in (right, doubt)))


def share_right(answer: str, accepted: list[str]) -> float:
    """Of a life the share of its facts, of any other answer whether it is right."""
    counts = counts_by_testbed(answer, accepted[0])
    if counts is None:
        return float(answer in accepted)
    return counts.num_correct / (counts.num_correct + counts.num_missing)


@pytest.mark.parametrize("preset", ["quickstart", "knowtuning"])
def test_the_testbed_of_a_preset_comes_with_the_package(preset: str) -> None:
    config = load_config(preset).testbed
    found = shipped_testbed(config)
    assert found is not None
    assert found.directory.name == preset
    assert shipped_testbed(config.model_copy(update={"seed": 1})) is None
    (weights,) = found.model.glob("*.safetensors")
    assert weights.stat().st_size <= 8e6
    assert read(found.pool) == list(pool_rows(build_world(config).facts, config.seed, config.outside_share))


@pytest.mark.parametrize(("preset", "num_questions", "max_tokens"), [("quickstart", 600, 8), ("knowtuning", 120, 80)])
def test_shipped_models_know_what_they_were_shown_often_and_not_what_they_were_not(
    preset: str, num_questions: int, max_tokens: int
) -> None:
    bed = shipped_testbed(load_config(preset).testbed)
    assert bed is not None
    asked = ask(bed, num_questions, max_tokens)
    assert asked.accuracy["well"] > 0.9
    assert asked.accuracy["stranger"] < 0.15
    assert asked.accuracy["stranger"] + 0.1 < asked.accuracy["partly"] < asked.accuracy["well"] - 0.15


@pytest.mark.whole
def test_a_model_that_is_built_knows_what_it_was_shown_often_and_doubts_what_it_was_not(tmp_path: Path) -> None:
    config = TestbedConfig(num_people=80, num_seed_people=20, num_steps=200, batch_size=96)
    asked = ask(build_testbed(config, tmp_path / "bed"), 400, 8)
    accuracy, entropy = asked
    assert accuracy["well"] > 0.85
    assert accuracy["stranger"] < 0.15
    assert accuracy["stranger"] - 0.05 < accuracy["partly"] < accuracy["well"] - 0.2
    assert entropy["well"] < 1.0
    assert entropy["stranger"] > entropy["well"] + 1.5
