"""Real questions: a testbed of real facts, a campaign on it, and a knowledge map of another question set.

Trains the testbed's model on part of a QA file (some subjects shown, some not), runs a campaign on that file's
questions, and maps with `ka2l probe` what the same model knows of a set it has never seen. Answers are graded against
the files' own references.

    python benchmarks/bench_real_facts.py --facts entityquestions_train.jsonl --other nq_open_dev.jsonl --num-facts 2000

Both files hold JSON lines with question and answers. 2,000 facts took 22 minutes on two cores that also
ran the tests.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from arms import WITHOUT_DECODER, ka2l, run_arm, set_options
from bench_campaign import digest
from machine import write_result


def drawn(facts: Path, num_facts: int | None, work: Path) -> Path:
    """The facts file, or a file with some of its lines."""
    if num_facts is None:
        return facts
    lines = facts.read_text(encoding="utf-8").splitlines(keepends=True)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "facts.jsonl"
    file.write_text("".join(random.Random(0).sample(lines, num_facts)), encoding="utf-8")
    return file


def campaign(facts: Path, budget: int, work: Path) -> dict[str, Any]:
    """Three rounds on the testbed of real facts."""
    folder = work / "campaign"
    given = [f"testbed.facts={facts.resolve()}", f"selection.budget={budget}", "name=real-facts"]
    run_arm(folder, [*WITHOUT_DECODER, *given])
    return digest(json.loads((folder / "summary.json").read_text()))


def knowledge_map(facts: Path, other: Path, work: Path) -> dict[str, Any]:
    """What the model of real facts knows of another question set."""
    folder = work / "probe"
    if not (folder / "summary.json").exists():
        given = [
            f"testbed.facts={facts.resolve()}",
            f"pool.path={other.resolve()}",
            "pool.columns=null",
            "sampler.max_model_len=256",
        ]
        ka2l("probe", "quickstart", "--run-dir", str(folder), *set_options([*WITHOUT_DECODER, *given]))
    summary = json.loads((folder / "summary.json").read_text())
    first = summary["rounds"][0]
    pool = json.loads((folder / "pool" / "questions" / "manifest.json").read_text())["metrics"]
    return {key: first[key] for key in ("accuracy", "accuracy_ci", "probe", "unknown_fraction")} | {"pool": pool}


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="JSONL of facts to build the testbed from")
    parser.add_argument("--other", type=Path, required=True, help="JSONL of questions for `ka2l probe`")
    parser.add_argument("--num-facts", type=int, help="draw so many of the facts; all where not given")
    parser.add_argument("--budget", type=int, default=250, help="annotations a round")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_real_facts"), help="where the runs go; kept")
    parser.add_argument("--out", help="result file; in benchmarks/results/real_facts where not given")
    arguments = parser.parse_args()
    facts = drawn(arguments.facts, arguments.num_facts, arguments.work)
    result = {
        "facts": arguments.facts.name,
        "num_facts": arguments.num_facts,
        "campaign": campaign(facts, arguments.budget, arguments.work),
        "other": arguments.other.name,
        "knowledge_map": knowledge_map(facts, arguments.other, arguments.work),
    }
    path = write_result("real_facts", result, arguments.out)
    print(json.dumps(result, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
