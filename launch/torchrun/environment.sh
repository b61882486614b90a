# shellcheck shell=bash
# Sourced by the starters beside it and by launch/slurm/train.sbatch: what torchrun's processes need in their environment.
# The manifests in launch/kubernetes and docker/compose.yaml set the same two TORCH variables (a test compares them).

# The repository's own environment, where there is one (launch/setup.sh makes it; the image has it at the same place).
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$repository/.venv/bin:$PATH
export PATH

# Without this, workers that are restarted get the store of the agents' rendezvous with everything in it that the dead ones
# have left (pytorch#135712): with gloo 7 of 16 restarts then failed or hung, with it none of 10.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# So many seconds torchrun waits for its workers between its own SIGTERM and their SIGKILL. train.py's last save has a
# budget of 30 s (`stop_on(budget=...)`), which must fit in. Older versions of torch always wait 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT-45}

# Else every rank starts as many threads as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}
