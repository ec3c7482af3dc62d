"""Does a campaign survive whatever happens to its processes and its storage?

Small campaigns run from beginning to end while, at random times, a process is killed with SIGKILL (the driver, an
engine's worker, a training worker, a raylet), writes to the run directory fail, or a worker hangs. A driver that ends
is followed by `ka2l resume`. Every run must come to the tables and adapters of an undisturbed one, ask the annotator
for nothing twice, and leave no process, placement group or temporary file.

    python benchmarks/bench_chaos.py --faults 100 --seed 0

Takes about 25 s a fault on two cores. What failed is printed with its trial's seed: --seed N --trials 1 repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from machine import write_result

from engine.stages import pool_folders, round_folders
from engine.store.run_directory import RunDirectory

HERE = Path(__file__).resolve().parent
ROUNDS = 1
#: What is killed, by the beginning of its process's title.
TARGETS = {"worker": "ray::MapWorker", "trainer": "ray::RayTrainWorker", "raylet": "raylet"}
#: Faults that a run gets over by itself.
SURVIVED = ("worker", "trainer", "storage", "hang", "node")
#: Faults that do end it. (A storm of failing writes may or may not.)
ENDING = ("driver", "raylet")
#: Writes that fail one after the other; the storage is asked four times before a run gives up.
NUM_WRITES = 3
FOUR_IN_A_ROW = 5
DRIVER_ENDS_S, RUN_ENDS_S = 180.0, 900.0
DEADLINE_S = 40.0


class Fault(NamedTuple):
    """Something that happened to a run."""

    kind: str
    at_s: float
    """Since the run, or the attempt that it hit, began."""
    stage: str
    """Which was at work."""


class Trial(NamedTuple):
    """One run from beginning to end."""

    seed: int
    nodes: int
    faults: list[Fault]
    num_resumed: int
    seconds: float
    problems: list[str]


def campaign(folder: Path) -> Path:
    """A config for one round on 108 questions in six shards."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from models import build_tiny_model

    model = build_tiny_model("llama-2", folder / "model")
    asked = ("size", "colour", "taste", "name")
    rows = [
        {"id": f"q{i:03d}", "question": f"What is the {asked[i % 4]} of thing {i // 4}?", "answers": [f"answer {i}"]}
        for i in range(108)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "chaos",
        "rounds": ROUNDS,
        "shard_rows": 20,
        "model": {"path": str(model), "dtype": "float32"},
        "pool": {"path": str(folder / "pool.jsonl"), "num_seed": 24, "num_eval": 24},
        "prompt": {"template": "plain", "instruction": "", "num_shots": 0},
        "sampler": {"kind": "transformers", "num_samples": 4, "temperature": 0.15, "max_tokens": 4},
        "extraction": {"batch_size": 32},
        "probe": {"kind": "linear", "num_epochs": 10, "num_bootstrap": 50},
        "selection": {"budget": 24},
        "tuning": {"max_steps": 8, "batch_size": 16, "learning_rate": 0.01, "num_rehearsal_samples": 2},
        "faults": {"deadline_s": DEADLINE_S},
    }
    config = folder / "chaos.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def processes(marker: Path) -> Iterator[tuple[int, str]]:
    """Living processes that were started for a trial, with their titles."""
    wanted = f"KA2L_CHAOS={marker}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):
            if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                title = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    yield int(entry), title


class Run:
    """A campaign, its Ray and what happens to them."""

    temporaries: ClassVar[list[Path]] = []
    """Folders for Ray's and everybody's temporary files, of all runs. Ray writes its logs there to the very end."""

    def __init__(self, config: Path, folder: Path, seed: int, num_nodes: int) -> None:
        self.config = config
        self.folder = folder
        self.run_dir = folder / "run"
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        self.draw = random.Random(seed)
        self.num_nodes = num_nodes
        self.rays: list[subprocess.Popen[bytes]] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.num_started = 0
        self.temporary = Path(tempfile.mkdtemp(prefix="ka2l-chaos-", dir="/tmp"))  # a socket's path must be short
        self.temporaries.append(self.temporary)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "KA2L_CHAOS": str(self.orders),
            "PYTHONPATH": os.pathsep.join([str(HERE / "chaos_hooks"), str(HERE.parent)]),
            "RAY_TMPDIR": str(self.temporary),
            "TMPDIR": str(self.temporary),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-the-benchmark-0123456789abcdef",
            "RAY_worker_niceness": "0",
        }

    # -- what runs ----------------------------------------------------------------------------------------------------

    def start_ray(self) -> str | None:
        """Start the nodes, each a raylet of its own; the address, or None where the run starts Ray itself."""
        if self.num_nodes == 1:
            return None
        address = f"127.0.0.1:{20000 + self.draw.randrange(20000)}"
        for words in (
            ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"],
            [f"--address={address}"],
        ):
            self._start_node(words)
        return address

    def _start_node(self, words: list[str]) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=2", "--node-ip-address=127.0.0.1",
                   "--block", *words]  # fmt: skip
        log = (self.folder / f"node-{len(self.rays)}.log").open("wb")
        self.rays.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )
        deadline = time.monotonic() + 90
        while b"Ray runtime started" not in (self.folder / f"node-{len(self.rays) - 1}.log").read_bytes():
            if time.monotonic() > deadline or self.rays[-1].poll() is not None:
                raise RuntimeError(f"a Ray node did not come up, see {self.folder}")
            time.sleep(0.2)

    def start_driver(self, address: str | None) -> subprocess.Popen[bytes]:
        """`ka2l run --resume`, which also goes on with what was cut off."""
        words = ["run", str(self.config), "--run-dir", str(self.run_dir), "--resume"]
        words += ["--set", f"ray.address={address or 'local'}", "--set", "ray.num_cpus=2"]
        if address:
            words += ["--set", "sampler.replicas=2", "--set", "extraction.replicas=2"]
        self.num_started += 1
        log = (self.folder / f"driver-{self.num_started}.log").open("wb")
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "engine.cli", *words], env=self.environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        return self.driver

    def stop(self) -> None:
        """End what is left of the run's Ray."""
        for process in [self.driver, *self.rays]:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @property
    def running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def stage(self) -> str:
        """The stage at work."""
        with suppress(OSError, ValueError, KeyError):
            for line in reversed((self.run_dir / "events.jsonl").read_text().splitlines()):
                event = json.loads(line)
                if event["event"] == "stage_started":
                    return str(event["stage"])
        return ""

    # -- what happens to it -------------------------------------------------------------------------------------------

    def strike(self, kind: str) -> bool:
        """Make a fault happen while the driver is alive; False where there was nothing that it could hit."""
        while self.running:
            if self._strike(kind):
                return True
            time.sleep(0.05)
        return False

    def _strike(self, kind: str) -> bool:
        if kind in ("storage", "storm", "hang"):
            count = {"storage": self.draw.randint(1, NUM_WRITES), "storm": FOUR_IN_A_ROW, "hang": 1}[kind]
            order = "storage" if kind == "storm" else kind
            for index in range(count):
                (self.orders / f"{order}-{time.monotonic_ns()}-{index}").touch()
            return self._carried_out(order)
        if kind == "driver":
            assert self.driver is not None
            self.driver.kill()
            return True
        if kind == "node":
            os.killpg(self.rays.pop().pid, signal.SIGKILL)
            return True
        found = [pid for pid, title in processes(self.orders) if TARGETS[kind] in title.split(" ")[0]]
        if not found:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.draw.choice(found), signal.SIGKILL)
            return True
        return False

    def _carried_out(self, order: str) -> bool:
        """Wait until an order has been taken; what is left when the driver ends is taken back."""
        while self.running and not list(self.orders.glob(f"done-{order}-*")):
            time.sleep(0.05)
        taken = list(self.orders.glob(f"done-{order}-*"))
        for path in taken:
            path.unlink()
        if not self.running:
            for path in self.orders.glob(f"{order}-*"):
                path.unlink(missing_ok=True)
        return bool(taken)


def live_through(run: Run, wanted: list[str], typical_s: float) -> tuple[list[Fault], int, list[str]]:
    """Run a campaign to its end with faults on the way; what happened, how often it was resumed, what went wrong."""
    faults: list[Fault] = []
    problems: list[str] = []
    left = list(wanted)
    address = run.start_ray()
    while run.num_started < len(wanted) + 3:
        begun = time.monotonic()
        driver = run.start_driver(address)
        struck: list[str] = []
        while left and run.running and not set(struck) & set(ENDING):
            with suppress(subprocess.TimeoutExpired):
                driver.wait(run.draw.uniform(0.0, 0.4 * typical_s))
            stage, at_s = run.stage(), time.monotonic() - begun
            if run.strike(left[0]):
                struck.append(left.pop(0))
                faults.append(Fault(struck[-1], round(at_s, 1), stage))
        try:
            code = driver.wait(DRIVER_ENDS_S if set(struck) & set(ENDING) else RUN_ENDS_S)
        except subprocess.TimeoutExpired:
            problems.append(f"the driver goes on and on after {struck}")
            driver.kill()
            code = driver.wait()
        if code == 0:
            return faults, run.num_started - 1, problems
        if set(struck) <= set(SURVIVED):
            said = (run.folder / f"driver-{run.num_started}.log").read_text(errors="replace").splitlines()[-8:]
            problems.append(f"exit code {code} after {struck}: " + " | ".join(said))
    return faults, run.num_started - 1, [*problems, "resumed too often"]


def compare(run_dir: Path, reference: Path) -> list[str]:
    """How a run's tables and adapters differ from the undisturbed run's."""
    from safetensors.torch import load_file

    found = []
    ours, theirs = RunDirectory(run_dir), RunDirectory(reference)
    places: list[tuple[str, int | None]] = [(name, None) for name in pool_folders()]
    places += [(name, index) for index in range(ROUNDS + 1) for name in round_folders()]
    for name, index in places:
        mine, other = ours.stage(name, index), theirs.stage(name, index)
        if other.manifest() is None:
            continue
        if mine.manifest() is None:
            found.append(f"{mine.label} is not committed")
        elif other.shard_names():
            columns = [column for column in other.table().column_names if column != "annotated_at"]
            if not mine.table(columns).equals(other.table(columns)):
                found.append(f"{mine.label} differs")
        if name == "tune" and mine.manifest() is not None:
            a, b = (load_file(f"{stage.path}/adapter/adapter_model.safetensors") for stage in (mine, other))
            if max(float((a[key] - b[key]).abs().max()) for key in b) > 1e-6:
                found.append(f"the adapter of {mine.label} differs")
    return found


def check(run: Run, reference: Path) -> list[str]:
    """What a trial left that it should not have."""
    found = compare(run.run_dir, reference)
    asked: Counter[str] = Counter()
    for line in (run.orders / "asked.jsonl").read_text().splitlines():
        asked.update(json.loads(line))
    # A driver that is killed between the annotator's answer and its shard asks the free reference answers again.
    table = RunDirectory(run.run_dir).stage("annotate", 0).table(["question_id"])["question_id"].to_pylist()
    if len(set(table)) != len(table):
        found.append("questions were annotated twice")
    if set(table) != set(asked):
        found.append("the annotations are not those that were asked for")
    names = ("attempts", "scratch")
    left = [str(path) for path in run.run_dir.rglob("*") if path.name.startswith(".tmp-") or path.name in names]
    left += [str(path) for path in run.temporary.iterdir() if path.name != "ray"]  # where Ray keeps its logs
    return [*found, *(f"left behind: {path}" for path in left)]


def groups_left(run: Run) -> list[str]:
    """Placement groups that outlive the runs on a cluster."""
    code = (
        "import ray, json; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
        "print(json.dumps([g['state'] for g in ray.util.placement_group_table().values()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=run.environment | {"KA2L_CHAOS": ""}, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    states = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else [done.stderr[-300:]]
    return [f"placement group {state}" for state in states if state != "REMOVED"]


def trial(config: Path, folder: Path, seed: int, reference: Path, typical_s: float) -> Trial:
    """One run with faults drawn by its seed."""
    draw = random.Random(seed)
    num_nodes = draw.choice([1, 1, 2])
    kinds = ["driver", "worker", "worker", "trainer", "storage", "storm", "hang"] + (
        ["node"] if num_nodes == 2 else ["raylet"]
    )
    wanted = [draw.choice(kinds) for _ in range(draw.randint(4, 9))]
    while wanted.count("node") > 1:
        wanted.remove("node")
    run = Run(config, folder, seed, num_nodes)
    started = time.monotonic()
    try:
        faults, num_resumed, problems = live_through(run, wanted, typical_s)
        problems += check(run, reference)
        if num_nodes == 2:
            problems += groups_left(run)
    except Exception as error:
        faults, num_resumed, problems = [], run.num_started, [f"{type(error).__name__}: {error}"]
    finally:
        run.stop()
    return Trial(seed, num_nodes, faults, num_resumed, round(time.monotonic() - started, 1), problems)


def wait_for_end(folder: Path, seconds: float) -> list[str]:
    """Processes of any trial that have not ended in time."""
    deadline = time.monotonic() + seconds
    while True:
        left = [f"{pid} {title[:80]}" for path in folder.glob("trial-*/orders") for pid, title in processes(path)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="go on until so many have happened")
    parser.add_argument("--trials", type=int, default=10**6, help="at most so many runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others count up from it")
    parser.add_argument("--keep", help="folder that keeps all runs and logs")
    parser.add_argument("--out", help="result file; in benchmarks/results/chaos where not given")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="ka2l-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    config = campaign(folder)
    undisturbed = Run(config, folder / "undisturbed", 0, 1)
    started = time.monotonic()
    live_through(undisturbed, [], 0.0)
    typical_s = time.monotonic() - started
    print(f"undisturbed: {typical_s:.0f} s", flush=True)
    trials: list[Trial] = []
    while sum(len(done.faults) for done in trials) < arguments.faults and len(trials) < arguments.trials:
        seed = arguments.seed + len(trials)
        done = trial(config, folder / f"trial-{seed}", seed, undisturbed.run_dir, typical_s)
        trials.append(done)
        struck = ", ".join(f"{fault.kind}@{fault.stage or 'start'}" for fault in done.faults)
        print(f"seed {seed}: {done.nodes} node(s), {struck}; resumed {done.num_resumed} times, {done.seconds:.0f} s; "
              + ("; ".join(done.problems) or "as undisturbed"), flush=True)  # fmt: skip
        write_result("chaos", summary(trials, typical_s, None), arguments.out)
    orphans = wait_for_end(folder, 180)
    print(f"wrote {write_result('chaos', summary(trials, typical_s, orphans), arguments.out)}")
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    for temporary in Run.temporaries:
        shutil.rmtree(temporary, ignore_errors=True)
    sys.exit(bool(orphans) or any(done.problems for done in trials))


def summary(trials: Sequence[Trial], typical_s: float, orphans: list[str] | None) -> dict[str, Any]:
    """What has happened so far; ``orphans`` None where nobody has looked for them yet."""
    counts = Counter(fault.kind for done in trials for fault in done.faults)
    return {
        "num_faults": counts.total(),
        "faults": dict(counts),
        "stages_struck": dict(Counter(fault.stage or "start" for done in trials for fault in done.faults)),
        "num_runs": len(trials),
        "num_resumed": sum(done.num_resumed for done in trials),
        "num_runs_with_problems": sum(bool(done.problems) for done in trials),
        "orphans": orphans,
        "undisturbed_s": round(typical_s, 1),
        "trials": [done._asdict() | {"faults": [fault._asdict() for fault in done.faults]} for done in trials],
    }


if __name__ == "__main__":
    main()
