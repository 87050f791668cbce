#!/usr/bin/env bash
# One node: NPROC=8 launch/one_node.sh train --preset ultramem-151m-x12 --data DIR --run-dir DIR [...]
# NPROC defaults to the GPUs of this node, or 2 processes without any.
# With CUDA_VISIBLE_DEVICES=4,5 it takes those GPUs, the first NPROC of them.
# MASTER_PORT is where rank 0 listens; unset, a free one is taken.
# SIGTERM, SIGUSR1 and Ctrl-C reach the ranks: they save after the step in progress and end with exit code 0.
set -euo pipefail
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
if [[ ! $nproc =~ ^[1-9][0-9]*$ ]]; then
  echo "error: NPROC=$nproc must be a whole number from 1 on: the ranks of this node" >&2
  exit 2
fi
if [ "$gpus" -eq 0 ]; then # CPU ranks share the cores
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > nproc ? $(nproc) / nproc : 1))}
fi
count=(--num_gpus "$nproc")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  if [ "$nproc" -gt "$gpus" ]; then
    echo "error: NPROC=$nproc, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES shows $gpus GPUs" >&2
    exit 2
  fi
  # Given a number, DeepSpeed would take the node's first GPUs instead.
  CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$nproc" <<<"$CUDA_VISIBLE_DEVICES")
  export CUDA_VISIBLE_DEVICES
  count=()
fi
exec "$python" -m ultramem_ds.launcher ${count[@]+"${count[@]}"} --no_local_rank \
  --master_addr 127.0.0.1 --master_port "${MASTER_PORT:-}" --module ultramem_ds "$@"
