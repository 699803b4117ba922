#!/usr/bin/env bash
# One command on the GPUs of several nodes, one process for each GPU, in the active environment:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh python -m hgdpo_jax.main --config … --workdir …
# All nodes need to see the workdir. Before its time is up, or when a node is needed for others, the job saves and is
# queued again; so is one that lost a process, 100 times at most (docs/clusters.md).
#SBATCH --job-name=hgdpo
#SBATCH --output=hgdpo-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@360
set -euo pipefail
[ $# -gt 0 ] || { echo "what is to run? sbatch launch/slurm.sh python -m hgdpo_jax.main …" >&2; exit 2; }
times=100
code=0
HGDPO_DISTRIBUTED=1 srun "$@" || code=$?
case $code in
  75 | 134 | 137 | 139 | 253)  # it is to go on; a process was aborted, killed or crashed; srun lost a node
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$times" ]; then
      echo "ended with $code: queued again, $((${SLURM_RESTART_COUNT:-0} + 1)) of $times times" >&2
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "ended with $code: was queued again $times times, and is not once more" >&2
    fi ;;
esac
exit "$code"
