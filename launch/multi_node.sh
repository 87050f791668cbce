#!/usr/bin/env bash
# Several nodes, in one of two ways:
#   HOSTFILE=hosts launch/multi_node.sh train ...      from one node, with pdsh and password-less ssh to the
#                                                      others; a line per node: "worker-1 slots=8"
#   NODE_RANK=0 NNODES=2 MASTER_ADDR=worker-1 NPROC=8 launch/multi_node.sh train ...   on every node, no ssh
# MASTER_PORT is where rank 0 listens, the same on all nodes: 29500 if unset, with HOSTFILE or NNODES=1 a free
# one. Under srun or mpirun no script is needed: srun python -m ultramem_ds train ...
# SIGTERM, SIGUSR1 and Ctrl-C to any node's script reach its ranks, and through them all others: they save
# after the step in progress and end with exit code 0. With HOSTFILE the script's node must have ranks.
set -euo pipefail
python=${PYTHON:-python}
if [ -n "${HOSTFILE:-}" ]; then
  if [ -n "${NPROC:-}" ]; then
    echo "error: NPROC=$NPROC beside HOSTFILE, whose slots=N say how many ranks a node has: unset it" >&2
    exit 2
  fi
  exec "$python" -m ultramem_ds.launcher --hostfile "$HOSTFILE" --no_local_rank \
    --master_port "${MASTER_PORT:-}" --module ultramem_ds "$@"
fi
: "${NODE_RANK:?set HOSTFILE, or NODE_RANK, NNODES, MASTER_ADDR and NPROC}" "${NNODES:?}" "${MASTER_ADDR:?}" "${NPROC:?}"
exec "$python" -m ultramem_ds.launcher --no_ssh --node_rank "$NODE_RANK" --make_hostfile "$NNODES:$NPROC" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-}" --no_local_rank --module ultramem_ds "$@"
