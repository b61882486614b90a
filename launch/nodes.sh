#!/usr/bin/env bash
# Two nodes on this machine, for people with root: network namespaces with a link between them, torchrun on each. They train
# and save over a slow link; it is cut in the middle of a save; one goes on alone; one is killed. Says what happened, and
# ends with 1 if anything was not as it should be. About a minute. Needs iproute2 and util-linux; leaves nothing behind.
#
#   sudo bash launch/nodes.sh [--ipv6]        --ipv6: the nodes speak no IPv4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export OMP_NUM_THREADS=1
exec .venv/bin/python -m tests.kills.two_nodes "$@"
