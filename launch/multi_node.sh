#!/usr/bin/env bash
# Several nodes, in one of two ways:
#   HOSTFILE=hosts launch/multi_node.sh train ...      from one node, with password-less ssh to the others;
#                                                      a line per node: "worker-1 slots=8"
#   NODE_RANK=0 NNODES=2 MASTER_ADDR=worker-1 NPROC=8 launch/multi_node.sh train ...   on every node, no ssh
# SIGTERM, SIGUSR1 and Ctrl-C to any node's script reach its ranks, and through them all others: they save
# after the step in progress and end with exit code 0. With HOSTFILE the script's node must have ranks.
set -euo pipefail
python=${PYTHON:-python}
port=${MASTER_PORT:-29500}
if [ -n "${HOSTFILE:-}" ]; then
  exec "$python" -m ultramem_ds.launcher --hostfile "$HOSTFILE" --no_local_rank \
    --master_port "$port" --module ultramem_ds "$@"
fi
: "${NODE_RANK:?set HOSTFILE, or NODE_RANK, NNODES, MASTER_ADDR and NPROC}" "${NNODES:?}" "${MASTER_ADDR:?}" "${NPROC:?}"
exec "$python" -m ultramem_ds.launcher --no_ssh --node_rank "$NODE_RANK" --make_hostfile "$NNODES:$NPROC" \
  --master_addr "$MASTER_ADDR" --master_port "$port" --no_local_rank --module ultramem_ds "$@"
