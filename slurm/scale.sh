#!/usr/bin/env bash
# Run a study inside one allocation, every trial a step of its own size:
#
#   sbatch --nodes=4 slurm/scale.sh STUDY.yaml [options of `scalestudy run`]
#
# Nodes, partition, time and the rest are options of sbatch or SBATCH_* variables; nothing here wants editing, and what
# stands below can be overridden there as well.
#
# SCALESTUDY        the program, if it is neither in .venv/bin where sbatch was called nor on PATH
# SCALESTUDY_SETUP  a file to source first, with `module load …` and the like
#
#SBATCH --job-name=scalestudy
#SBATCH --output=scalestudy-%j.log
#SBATCH --open-mode=append
# Whole nodes: what others do on them would be measured too.
#SBATCH --exclusive
#SBATCH --mem=0
# Two minutes before the time limit the controller stops the trial under way and requeues the job, which then goes on.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# A node that fails costs its trial, not the job.
#SBATCH --no-kill

set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch --nodes=N slurm/scale.sh STUDY.yaml [options of 'scalestudy run']" >&2
    exit 2
fi
if [ -n "${SCALESTUDY_SETUP:-}" ]; then
    # Modules and conda read variables that are not set.
    set +u
    # shellcheck disable=SC1090
    source "$SCALESTUDY_SETUP"
    set -u
fi
program=${SCALESTUDY:-}
[ -n "$program" ] || program=${SLURM_SUBMIT_DIR:-.}/.venv/bin/scalestudy
[ -x "$program" ] || program=$(command -v scalestudy) || {
    echo "scale.sh: scalestudy is neither in ${SLURM_SUBMIT_DIR:-.}/.venv/bin nor on PATH; set SCALESTUDY to it" >&2
    exit 2
}
# exec: the signals that Slurm sends to the script are the controller's.
exec "$program" run --launcher slurm "$@"
