"""Fill a file of this folder in from the environment.

    KA2L_HEAD_IP=10.0.0.4 KA2L_WORKER_IPS=10.0.0.5,10.0.0.6 python cluster/fill.py on-premises.yaml > filled.yaml

Needs nothing but Python. What stands as ${KA2L_...} is replaced by the variable of that name, or by its default below;
without either it is an error. Other variables are left for the shell of the cluster.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

DEFAULTS = {
    # Name of the cluster.
    "KA2L_CLUSTER": "ka2l",
    # Image built from the Dockerfile of this folder, in a registry that the nodes reach.
    "KA2L_IMAGE": "ka2l:latest",
    # The job: preset or YAML file, and a run directory on storage that every node sees (a folder, s3:// or gs://).
    "KA2L_CONFIG": "quickstart",
    "KA2L_RUN": "/mnt/runs/ka2l",
    # How many workers, and how long an idle one is kept, minutes.
    "KA2L_MIN_WORKERS": "0",
    "KA2L_MAX_WORKERS": "4",
    "KA2L_IDLE_MINUTES": "5",
    # on-premises.yaml: addresses have no default. The environment with KA2L, at the same path on every machine.
    "KA2L_SSH_USER": os.environ.get("USER", "ubuntu"),
    "KA2L_SSH_KEY": "~/.ssh/id_ed25519",
    "KA2L_VENV": "/opt/ka2l/.venv",
    # aws.yaml: the instance profile, which may read and write the run directory, has no default.
    "KA2L_REGION": "us-east-1",
    "KA2L_HEAD_TYPE": "m7i.xlarge",
    "KA2L_WORKER_TYPE": "g6.2xlarge",
    # kuberay-rayjob.yaml: a claim (ReadWriteMany) that is mounted at /mnt/runs; size of a worker.
    "KA2L_TOKEN_SECRET": "ka2l-token",
    "KA2L_RUNS_CLAIM": "ka2l-runs",
    "KA2L_GPUS_PER_WORKER": "1",
    "KA2L_WORKER_CPUS": "8",
    "KA2L_WORKER_MEMORY": "48Gi",
}


def fill(text: str, values: dict[str, str]) -> str:
    """``text`` with every ${KA2L_...} replaced.

    Raises:
        KeyError: names the variables that have neither value nor default.
    """
    known = DEFAULTS | {name: value for name, value in values.items() if value}
    names = set(re.findall(r"\$\{(KA2L_\w+)\}", text))
    if missing := sorted(names - set(known)):
        raise KeyError(", ".join(missing))
    return re.sub(r"\$\{(KA2L_\w+)\}", lambda found: known[found[1]], text)


def main() -> None:
    """Print the file that is named, filled in."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, "\n".join(f"    {name:<22} {value}" for name, value in DEFAULTS.items()), sep="\n")
        raise SystemExit(0 if len(sys.argv) == 2 else 2)
    path = Path(sys.argv[1])
    path = path if path.exists() else Path(__file__).parent / path
    try:
        print(fill(path.read_text(encoding="utf-8"), dict(os.environ)), end="")
    except FileNotFoundError:
        raise SystemExit(f"{sys.argv[1]} is neither a file nor one of {Path(__file__).parent}") from None
    except KeyError as error:
        raise SystemExit(f"{path.name} needs {error.args[0]}: set it in the environment") from None


if __name__ == "__main__":
    main()
