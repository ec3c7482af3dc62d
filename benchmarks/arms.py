"""Arms of a benchmark: runs of a preset that differ in a few settings, resumable, with stages of round 0 shared."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: The campaign that is measured: longer than the quickstart, which has to end within minutes on two cores.
CAMPAIGN = (
    "rounds=3",
    "extraction.layers=[1, 2, 3]",
    "selection.budget=200",
    "decoder.num_corpus=20000",
    "decoder.num_epochs=5",
    "decoder.refit_epochs=1.5",
    "tuning.num_epochs=17",
)
#: The same without a decoder: questions of the pool alone, states as the probe likes them best.
WITHOUT_DECODER = (
    *CAMPAIGN,
    "testbed.outside_share=0",
    "extraction.layers=all",
    "extraction.position=last_token",
    "selection.budget=250",
    "decoder.kind=none",
    "annotator.reference_table=null",
)
#: What asks the base model alone: the same in every arm that has the same model, pool and probe.
SHARED_STAGES = ("observe", "cluster", "label", "extract", "probe", "knowledge")


def seeded_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser of the arguments that benchmarks of several seeds share; runs load nothing from the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(f"runs/bench_{name}"), help="where the runs go; kept")
    parser.add_argument("--out", help=f"result file; in benchmarks/results/{name} where not given")
    return parser


def ka2l(*words: str) -> None:
    """Run the command line as a user would."""
    subprocess.run([sys.executable, "-m", "engine.cli", *words], check=True, stdout=subprocess.DEVNULL)


def set_options(settings: Sequence[str]) -> list[str]:
    """``--set`` options for settings of the form a.b=c."""
    return [word for item in settings for word in ("--set", item)]


def run_arm(
    folder: Path,
    settings: Sequence[str],
    base: Path | None = None,
    *,
    preset: str = "quickstart",
    shared: Sequence[str] = SHARED_STAGES,
) -> None:
    """One run of ``preset`` with ``settings`` of the form a.b=c; goes on with what is committed in ``folder``.

    Args:
        base: the run directory of another arm whose ``shared`` stages are these, too; they are copied.
    """
    options = set_options(settings)
    if (folder / "config.yaml").exists():
        ka2l("resume", str(folder), *options)
    elif base is not None and (base / "round-000" / shared[-1] / "manifest.json").exists():
        shutil.copytree(base / "pool", folder / "pool")
        for stage in shared:
            shutil.copytree(base / "round-000" / stage, folder / "round-000" / stage)
        for name in ("config.yaml", "mode"):
            shutil.copy(base / name, folder / name)
        ka2l("resume", str(folder), *options)
    else:
        ka2l("run", preset, "--run-dir", str(folder), *options)
