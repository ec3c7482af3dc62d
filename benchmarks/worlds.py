"""The worlds that benchmarks on a lab share: invented people, and real facts with and without measured popularity."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arms import seeded_parser
from machine import command, latest_result, write_result

from ka2l.evaluation.statistics import json_safe
from ka2l.knowledge.evidence import DOUBT_WEIGHT
from ka2l.knowledge.semantic_entropy import LIKELIHOOD_DRAWS

if TYPE_CHECKING:
    from lab import Lab

#: A sixth of the people partly known, a quarter strangers: less than 45 % of the candidates is unknown to the model.
_SHARES = ("testbed.stranger_share=0.25", "testbed.partly_share=0.15")
#: Six hundred candidates and four hundred seed questions, of invented people or of that share of a file's subjects.
_SIZES = ("testbed.num_people=120", "testbed.num_seed_people=80", "testbed.outside_share=0")
_NUM_FACTS = 1000


class World(NamedTuple):
    """What a testbed's model is taught."""

    title: str
    files: tuple[str, ...] = ()
    """Of real questions, in the folder ``--data``; as many of each."""
    exposure: str | None = None
    """Column that says how well known a fact is; a seeded hash of the subject where None."""
    num_facts: int = _NUM_FACTS
    settings: tuple[str, ...] = ()
    """Of the testbed, beside those of every world."""


#: Of the well-known facts of one kind or source, many are learnt wrongly: about a tenth of all. Such a world takes more
#: steps to learn.
_STEPS = "testbed.num_steps=600"
_FOUR_SETS = ("entityquestions_train.jsonl", "popqa.jsonl", "nq_open_dev.jsonl", "medmcqa_validation.jsonl")

WORLDS = {
    "people": World("invented people"),
    "entity_questions": World("EntityQuestions", ("entityquestions_train.jsonl",)),
    "popqa": World("PopQA, by page views", ("popqa.jsonl",), "s_pop"),
    "mixed": World("four question sets", _FOUR_SETS, num_facts=2400),
    "people_misled": World(
        "invented people, most employers learnt wrongly",
        settings=(_STEPS, "testbed.wrong_share=0.7", "testbed.wrong_relations=[employer]"),
    ),
    "sets_misled": World(
        "three question sets, much of one learnt wrongly",
        _FOUR_SETS[:3],
        settings=(_STEPS, "testbed.wrong_share=0.5", "testbed.wrong_relations=[popqa]"),
    ),
}


def measure_worlds(
    doc: str | None,
    question: str,
    settings: Mapping[str, Any],
    measure: Callable[[Lab], dict[str, Any]],
    compare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **lab_options: Any,
) -> None:
    """The command line of a benchmark on labs: every seed of every world, the result written after each.

    Seeds that stand in the newest result with the same settings are taken over, so they can be added one at a time, by
    several processes, too; with ``--again`` those that are named are measured anew.

    Args:
        settings: what decides the figures beside world, seed and the method's own constants.
        measure: figures of one lab.
        compare: figures over the seeds of one world.
        lab_options: of `open_lab`.
    """
    settings = {**settings, "doubt_weight": DOUBT_WEIGHT, "likelihood_draws": LIKELIHOOD_DRAWS}
    parser = seeded_parser(doc, question)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=["people"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the question files")
    parser.add_argument("--again", action="store_true", help="measure what stands in the newest result, too")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for world in arguments.worlds:
            if str(seed) in _measured(question, settings).get(world, {}) and not arguments.again:
                continue
            found = measure(open_lab(world, seed, arguments.work, arguments.data, **lab_options))
            by_world = _measured(question, settings)  # now, since a process beside this one may have added seeds
            by_world.setdefault(world, {})[str(seed)] = json.loads(json.dumps(json_safe(found)))  # as it will be read
            result: dict[str, Any] = {"command": command_for(by_world), "settings": settings, "by_world": by_world}
            if compare:
                result["comparison"] = {name: compare(made) for name, made in by_world.items() if made}
            print(f"written: {write_result(question, result, arguments.out)}", flush=True)


def command_for(by_world: Mapping[str, Mapping[str, Any]]) -> str:
    """What measures all of it from nothing, whatever it was that added the last seed."""
    worlds: dict[tuple[int, ...], list[str]] = {}
    for world, by_seed in by_world.items():
        if by_seed:
            worlds.setdefault(tuple(sorted(map(int, by_seed))), []).append(world)
    return " && ".join(
        command([sys.argv[0], "--worlds", *names, "--seeds", *map(str, seeds)]) for seeds, names in worlds.items()
    )


def _measured(question: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the newest result, by world and seed; nothing where that was made with other settings."""
    before = latest_result(question) or {}
    same = before.get("settings") == json.loads(json.dumps(dict(settings)))
    return before["by_world"] if same else {}


def open_lab(
    world: str,
    seed: int,
    work: Path,
    data: Path,
    *,
    num_samples: int = 10,
    splits: Sequence[str] = ("seed", "candidate"),
    settings: Sequence[str] = (),
) -> Lab:
    """The lab of a world: its model is trained the first time.

    Raises:
        FileNotFoundError: a file of the world is not in ``data``.
    """
    from lab import Lab  # seconds to import, and those who only name worlds need none of it

    chosen = WORLDS[world]
    given = [*_SIZES, *_SHARES, *chosen.settings]
    if chosen.files:
        facts = _drawn(chosen, data, seed, work / f"{world}-{seed}.jsonl")
        given += [f"testbed.facts={facts.resolve()}"]
        given += [f"testbed.exposure={chosen.exposure}"] if chosen.exposure else []
    return Lab(work / f"{world}-{seed}", [*given, *settings], seed, num_samples, splits)


def _drawn(world: World, data: Path, seed: int, target: Path) -> Path:
    """As many questions of each file, each with the name of its file as ``relation``."""
    if not target.exists():
        rows = []
        for name in world.files:
            lines = (data / name).read_text(encoding="utf-8").splitlines()
            drawn = random.Random(seed).sample(lines, world.num_facts // len(world.files))
            # The file stands in for the relation: it is what leave-one-out leaves out.
            rows += [{**json.loads(line), "relation": name.partition(".")[0]} for line in drawn]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return target
