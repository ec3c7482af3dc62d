#!/usr/bin/env bash
# One run on a Slurm allocation: Ray's head on the first node, a worker on each other one.
#
#   sbatch --nodes=3 --gpus-per-node=4 cluster/slurm.sh quickstart /shared/runs/quickstart
#
# Submitting it again goes on with the run. KA2L_VENV names the environment (/opt/ka2l/.venv), KA2L_RAY_PORT the port.
#SBATCH --job-name=ka2l
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: sbatch [options] cluster/slurm.sh CONFIG RUN_DIR [options of ka2l run]" >&2
    exit 2
fi
config=$1 run_dir=$2
shift 2

bin=${KA2L_VENV:-/opt/ka2l/.venv}/bin
# Several jobs of one user may share a node: each its own port, token and folder.
port=${KA2L_RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
private=$(mktemp -d "$HOME/.ka2l-ray-XXXXXX")
trap 'rm -rf "$private"' EXIT
chmod 700 "$private"
(umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > "$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
ulimit -n 65536 2>/dev/null || true

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port
size=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

# --block: the process stays, so that Slurm ends the whole of Ray with the step.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "$bin/ray" start --head --node-ip-address="${address%:*}" --port="$port" --dashboard-host=127.0.0.1 \
    --disable-usage-stats "${size[@]}" --block &
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        "$bin/ray" start --address="$address" --disable-usage-stats "${size[@]}" --block &
done

for _ in $(seq 60); do
    alive=$(RAY_ADDRESS=$address "$bin/python" - 2>/dev/null <<'PYTHON' || echo 0
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
    )
    [[ $alive -ge ${#nodes[@]} ]] && break
    sleep 5
done
if [[ $alive -lt ${#nodes[@]} ]]; then
    echo "$alive of ${#nodes[@]} nodes have joined Ray at $address after five minutes: see the lines above" >&2
    exit 1
fi

RAY_ADDRESS=$address "$bin/ka2l" run "$config" --run-dir "$run_dir" --resume "$@"
