#!/usr/bin/env bash
# Trains on a fixed number of nodes. The same command on each of them, in any order, within ten minutes:
#
#   NODES=2 bash launch/torchrun/several_nodes.sh HOST:PORT ROOT LAST_STEP
#
# HOST is one of the nodes (by the name or address by which the others reach it), PORT a port that is free there.
# ROOT is a place that all nodes share: an object store's URL, or a path on a network file system.
#
# Environment:
#   NODES  how many
#   RANKS  processes per node: one per GPU if not given, or one per core where there are none
#   JOB    a name that is this job's own, if two jobs could meet at the same HOST:PORT
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  the network interface, where the host's name does not lead to the right one
set -euo pipefail
meeting=${1:?HOST:PORT is missing: where the nodes meet} root=${2:?ROOT is missing} last_step=${3:?LAST_STEP is missing}
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/torchrun/environment.sh
. "$here/environment.sh"

# c10d: torchrun's own meeting place, nothing to install. HOST keeps it; whoever recognises himself in that name does.
# --max-restarts: when a rank dies, on whatever node, all ranks of all nodes are started again.
exec torchrun --nnodes "${NODES:?how many nodes?}" --nproc-per-node "${RANKS-auto}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "${JOB-train}" --rdzv-conf join_timeout=600 \
    "$here/../train.py" "$root" "$last_step"
