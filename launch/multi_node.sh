#!/usr/bin/env bash
# Several nodes, in one of two ways:
#   HOSTFILE=hosts launch/multi_node.sh train ...      from one node, with password-less ssh to the others;
#                                                      a line per node: "worker-1 slots=8"
#   NODE_RANK=0 NNODES=2 MASTER_ADDR=worker-1 NPROC=8 launch/multi_node.sh train ...   on every node, no ssh
set -euo pipefail
python=${PYTHON:-python}
port=${MASTER_PORT:-29500}
if [ -n "${HOSTFILE:-}" ]; then
  exec "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --no_local_rank \
    --master_port "$port" --module ultramem_ds "$@"
fi
: "${NODE_RANK:?set HOSTFILE, or NODE_RANK, NNODES, MASTER_ADDR and NPROC}" "${NNODES:?}" "${MASTER_ADDR:?}" "${NPROC:?}"
# Without ssh the launcher still wants a hostfile, for the number of nodes and of ranks on each.
hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
for ((node = 0; node < NNODES; node++)); do echo "node-$node slots=$NPROC"; done >"$hosts"
"$python" -m deepspeed.launcher.runner --no_ssh --node_rank "$NODE_RANK" --hostfile "$hosts" \
  --master_addr "$MASTER_ADDR" --master_port "$port" --no_local_rank --module ultramem_ds "$@"
