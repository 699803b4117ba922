#!/usr/bin/env bash
# One command on the GPUs of several nodes, one process for each GPU, in the active environment:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh python -m hgdpo_jax.main --config … --workdir …
# All nodes need to see the workdir. Before its time is up, or when a node is needed for others, the job saves and is
# queued again (docs/clusters.md).
#SBATCH --job-name=hgdpo
#SBATCH --output=hgdpo-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail
[ $# -gt 0 ] || { echo "what is to run? sbatch launch/slurm.sh python -m hgdpo_jax.main …" >&2; exit 2; }
code=0
HGDPO_DISTRIBUTED=1 srun "$@" || code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
