#!/usr/bin/env bash
# Trains on as many nodes as there are, between two numbers: goes on with fewer when one is lost, and takes in one that
# comes. Each change starts all ranks again, from the newest step. The same command on each node, at any time:
#
#   NODES=1:2 bash launch/torchrun/elastic.sh HOST:PORT ROOT LAST_STEP
#
# HOST:PORT, ROOT and the environment are those of several_nodes.sh. The node that is HOST must live; so that any node may be
# lost, run the meeting place on a machine that trains nothing, and start all nodes with MEET_ELSEWHERE=yes:
#
#   python launch/torchrun/meeting.py PORT
set -euo pipefail
meeting=${1:?HOST:PORT is missing: where the nodes meet} root=${2:?ROOT is missing} last_step=${3:?LAST_STEP is missing}
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/torchrun/environment.sh
. "$here/environment.sh"

# last_call_timeout: when the least number of nodes has come, so long the others are waited for.
# keep_alive_*: a node that is not heard of for 3 x 5 s is lost.
patience=join_timeout=600,last_call_timeout=${LAST_CALL-30},keep_alive_interval=5,keep_alive_max_attempt=3
if [[ -n ${MEET_ELSEWHERE-} ]]; then patience+=,is_host=0; fi

# --max-restarts counts the deaths of ranks, not the nodes that come and go. A rank that ends because another node was
# told to stop counts as one (train.py's status 75), so it is not small here. What no restart mends ends torchrun at once.
exec torchrun --nnodes "${NODES:?how many nodes, at least:at most?}" --nproc-per-node "${RANKS-auto}" --max-restarts 100 \
    --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "${JOB-train}" --rdzv-conf "$patience" \
    "$here/../train.py" "$root" "$last_step"
