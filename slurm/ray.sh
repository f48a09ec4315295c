#!/usr/bin/env bash
# Bring a Ray cluster up in a Slurm allocation and run a study on it:
#
#   sbatch --nodes=4 slurm/ray.sh STUDY.yaml [options of `scalestudy run`]
#
# As with scale.sh, options of sbatch override what stands below, and SCALESTUDY and SCALESTUDY_SETUP mean the same.
#
#SBATCH --job-name=scalestudy-ray
#SBATCH --output=scalestudy-ray-%j.log
#SBATCH --exclusive
#SBATCH --mem=0
# So long before the time limit the trial under way is stopped; the same sbatch again goes on where it was.
#SBATCH --signal=B:USR1@120

set -euo pipefail

fail() {
    echo "ray.sh: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "usage: sbatch --nodes=N slurm/ray.sh STUDY.yaml [options of 'scalestudy run']"
if [ -n "${SCALESTUDY_SETUP:-}" ]; then
    # Modules and conda read variables that are not set.
    set +u
    # shellcheck disable=SC1090
    source "$SCALESTUDY_SETUP"
    set -u
fi
program=${SCALESTUDY:-}
[ -n "$program" ] || program=${SLURM_SUBMIT_DIR:-.}/.venv/bin/scalestudy
[ -x "$program" ] || program=$(command -v scalestudy) ||
    fail "scalestudy is neither in ${SLURM_SUBMIT_DIR:-.}/.venv/bin nor on PATH; set SCALESTUDY to it"
bin=$(dirname "$program")
[ -x "$bin/ray" ] || fail "$bin has no ray: pip install 'scalestudy[ray]'"

# A step without --gres has none of the GPUs that the job was given.
gpus=$("$bin/python" - "$SLURM_JOB_ID" "$1" << 'PYTHON'
import sys
from pathlib import Path

from scalestudy.launch.errors import InputError
from scalestudy.launch.slurm import gpus_of_job
from scalestudy.launch.study import load_study

try:
    print(gpus_of_job(sys.argv[1], load_study(Path(sys.argv[2])).device))
except InputError as error:
    sys.exit(f"ray.sh: {error}")
PYTHON
) || exit 2
gres=none
[ "$gpus" = 0 ] || gres=gpu:$gpus

# How other nodes reach a node: its address in Slurm, as a number. Its name need not resolve.
address_of() {
    getent ahostsv4 "$(sinfo --noheader --Node --nodes="$1" --format=%o | head -n 1)" | awk 'NR == 1 { print $1 }'
}

# This script runs on the first node, which is Ray's head.
head=$(address_of "$SLURMD_NODENAME")
read -r port dashboard < <("$bin/python" -m scalestudy.cluster.ports 2)

# One of these runs on each node, as long as the job. A folder of its own for each: nodes of a test cluster are one host.
# shellcheck disable=SC2329  # called by srun's tasks
node() {
    local mine agent
    mine=$(address_of "$SLURMD_NODENAME")
    agent=$("$bin/python" -m scalestudy.cluster.ports 1)
    local options=(--block --node-ip-address="$mine" --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus"
        --temp-dir="/tmp/ray-$SLURM_JOB_ID-$SLURM_NODEID" --dashboard-agent-listen-port="$agent")
    if [ "$mine" = "$head" ]; then
        exec "$bin/ray" start --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" "${options[@]}"
    fi
    until (exec 3<> "/dev/tcp/$head/$port") 2> /dev/null; do sleep 0.5; done
    exec "$bin/ray" start --address="$head:$port" "${options[@]}"
}
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} bin head port dashboard gpus
export -f node address_of

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap --mpi=none \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --gres="$gres" --output="ray-$SLURM_JOB_ID-%N.log" \
    bash -c node &
nodes=$!
run=
trap '[ -z "$run" ] || kill -TERM "$run"' USR1 TERM
trap 'kill -TERM $nodes 2> /dev/null; wait $nodes || true; rm -rf /tmp/ray-"$SLURM_JOB_ID"-*' EXIT

export RAY_ADDRESS=$head:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export PATH=$bin:$PATH
"$bin/python" - "$SLURM_JOB_NUM_NODES" << 'PYTHON' || fail "the cluster did not come up; see ray-$SLURM_JOB_ID-*.log"
import logging, sys, time
import ray

for attempt in range(60):
    try:
        ray.init(logging_level=logging.CRITICAL, log_to_driver=False)
        if sum(node["Alive"] for node in ray.nodes()) == int(sys.argv[1]):
            sys.exit(0)
        ray.shutdown()
    except ConnectionError:
        pass
    time.sleep(1)
sys.exit(1)
PYTHON

"$program" run --launcher ray "$@" &
run=$!
# A trapped signal ends the first wait before the run has ended.
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do
    wait "$run" || code=$?
done
exit "$code"
