"""Real questions: a testbed of real facts, a campaign on it, and a knowledge map of another question set.

Trains the testbed's model on part of a QA file (some subjects shown, some not), runs a campaign on that file's
questions, and maps with `ka2l probe` what the same model knows of a set it has never seen. Answers are graded against
the files' own references.

    python benchmarks/bench_real_facts.py --facts entityquestions_train.jsonl --other nq_open_dev.jsonl

Both files hold JSON lines with question and answers. Takes about 20 minutes for 5,000 facts on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_campaign import digest
from machine import write_result


def ka2l(*words: str) -> str:
    """Run the command line as a user would; returns its standard output."""
    done = subprocess.run([sys.executable, "-m", "engine.cli", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def sets(**values: str) -> list[str]:
    """``--set`` options; ``__`` stands for a dot."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def campaign(facts: Path, budget: int, work: Path) -> dict[str, Any]:
    """Three rounds on the testbed of real facts."""
    folder = work / "campaign"
    if (folder / "config.yaml").exists():
        ka2l("resume", str(folder))
    else:
        options = sets(testbed__facts=str(facts.resolve()), selection__budget=str(budget), name="real-facts")
        ka2l("run", "quickstart", "--run-dir", str(folder), *options)
    return digest(json.loads((folder / "summary.json").read_text()))


def knowledge_map(facts: Path, other: Path, work: Path) -> dict[str, Any]:
    """What the model of real facts knows of another question set."""
    folder = work / "probe"
    if not (folder / "summary.json").exists():
        options = sets(
            testbed__facts=str(facts.resolve()),
            pool__path=str(other.resolve()),
            pool__columns="null",
            sampler__max_model_len="256",
        )
        ka2l("probe", "quickstart", "--run-dir", str(folder), *options)
    summary = json.loads((folder / "summary.json").read_text())
    first = summary["rounds"][0]
    pool = json.loads((folder / "pool" / "questions" / "manifest.json").read_text())["metrics"]
    return {key: first[key] for key in ("accuracy", "accuracy_ci", "probe", "unknown_fraction")} | {"pool": pool}


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="JSONL of facts to build the testbed from")
    parser.add_argument("--other", type=Path, required=True, help="JSONL of questions for `ka2l probe`")
    parser.add_argument("--budget", type=int, default=600, help="annotations a round")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_real_facts"), help="where the runs go; kept")
    parser.add_argument("--out", help="result file; benchmarks/results/real_facts.json where not given")
    arguments = parser.parse_args()
    result = {
        "facts": arguments.facts.name,
        "campaign": campaign(arguments.facts, arguments.budget, arguments.work),
        "other": arguments.other.name,
        "knowledge_map": knowledge_map(arguments.facts, arguments.other, arguments.work),
    }
    path = write_result("real_facts", result, arguments.out)
    print(json.dumps(result, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
