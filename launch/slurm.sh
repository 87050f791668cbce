#!/usr/bin/env bash
#SBATCH --job-name=ultramem
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# sbatch launch/slurm.sh train --preset ultramem-1.6b-x12 --data DIR --run-dir DIR [...]
# Requeued jobs resume by themselves from the run directory's latest checkpoint.
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-29500} NNODES=$SLURM_NNODES NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' \
  "$(dirname "$0")/multi_node.sh" "$@"
