#!/usr/bin/env bash
#SBATCH --job-name=ultramem
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# sbatch launch/slurm.sh train --preset ultramem-1.6b-x12 --data DIR --run-dir DIR [...]
# Five minutes before the time limit SLURM signals this script, which hands the signal to srun, srun to
# every node's launcher, and that to the ranks: they save and end with exit code 0, and the job is queued
# again. Requeued jobs, pre-empted ones too, resume by themselves from the latest checkpoint.
# Submit from the repository's root: SLURM runs a copy of this file. PYTHON names the interpreter.
set -euo pipefail
launch=$(dirname "$0")
if [ ! -f "$launch/multi_node.sh" ]; then launch=${SLURM_SUBMIT_DIR:-.}/launch; fi
if [ ! -f "$launch/multi_node.sh" ]; then
  echo "$launch/multi_node.sh is not there: submit this script from the repository's root" >&2
  exit 2
fi
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 19000))} NNODES=$SLURM_NNODES NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
stopped=
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' \
  "$launch/multi_node.sh" "$@" &
step=$!
trap 'stopped=time; kill -USR1 $step' USR1
trap 'stopped=asked; kill -USR1 $step' TERM # of SIGTERM srun kills its tasks
while kill -0 $step 2>/dev/null; do wait $step || true; done # a signal ends wait, not srun
status=0
wait $step || status=$?
if [ "$stopped" = time ] && [ "$status" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
