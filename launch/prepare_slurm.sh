#!/usr/bin/env bash
#SBATCH --job-name=ultramem-prepare
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
# sbatch [--array=0-N] launch/prepare_slurm.sh --input PATH... --output DIR --tokenizer FILE [...]
# Every task does its share of the files' units; the last one to finish merges. Tasks that were killed
# or requeued go on where they were; submitting the whole array again does only what is missing.
set -euo pipefail
exec "${PYTHON:-python}" -m ultramem_ds prepare "$@" --workers "$SLURM_CPUS_PER_TASK" \
  --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
