#!/usr/bin/env bash
# Trains on this machine. Stop it (Ctrl-C, kill) and start it again, also with another number of ranks: it goes on.
#
#   bash launch/torchrun/one_node.sh ROOT LAST_STEP        ROOT: a path, or any URL that fsspec opens
#
# Environment: RANKS, how many processes: one per GPU if not given, or one per core where there are none.
set -euo pipefail
root=${1:?ROOT is missing: where the checkpoints go} last_step=${2:?LAST_STEP is missing}
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/torchrun/environment.sh
. "$here/environment.sh"

# --standalone: torchrun takes a free port by itself, so several jobs may run on one machine.
# --max-restarts: when a rank dies, all are started again, and go on from the newest step.
exec torchrun --standalone --nproc-per-node "${RANKS-auto}" --max-restarts 3 \
    "$here/../train.py" "$root" "$last_step"
