#!/usr/bin/env bash
# A Slurm cluster on this machine, to try train.sbatch: a controller and two nodes, for as long as a command runs.
#
#   bash launch/slurm/local.sh                                          a shell in which sbatch, squeue, ... work
#   bash launch/slurm/local.sh sbatch --wait launch/slurm/train.sbatch /tmp/run 200
#
# Needs root (each node has a host name and a host table of its own) and Debian's packages: apt-get install slurm-wlm munge.
# Nothing outside of a temporary folder is written, and nothing stays; other Slurms and munges on this machine are not touched.
# Two partitions: jobs in `high` preempt those in `low` (the default), which have 40 s to save and are then put back
# into the queue.
set -euo pipefail
say() { printf 'local.sh: %s\n' "$*" >&2; }

for program in munged slurmctld slurmd sbatch unshare python3; do
    command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin
    command -v "$program" >/dev/null || { say "$program is missing: apt-get install slurm-wlm munge util-linux"; exit 1; }
done
((EUID == 0)) || { say "this needs root"; exit 1; }

nodes=(node-0 node-1)
place=$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")
pids=()
# shellcheck disable=SC2329 # called by the trap
end() {
    set +e
    [[ ${#pids[@]} == 0 ]] || kill "${pids[@]}" 2>/dev/null
    wait "${pids[@]}" 2>/dev/null
    [[ -z ${KEEP_LOGS-} ]] || cp "$place"/*.log "$KEEP_LOGS"
    rm -rf "$place"
}
trap end EXIT
chmod 755 "$place" # munged looks at it
mkdir -m 700 "$place/state"

# Free ports: nothing here has a fixed one.
read -r -a ports < <(python3 - <<'PY'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in sockets))
PY
)

# All nodes live at the loopback interface; the name of each leads there, on all of them.
printf '127.0.0.1 localhost controller %s\n' "${nodes[*]}" >"$place/hosts"

export SLURM_CONF=$place/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a job that is put back into the queue starts again when its old credential has run out, 120 s if not said.
AuthInfo=socket=$place/munge.socket,cred_expire=5
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool-%n
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd-%n.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd-%n.log
# No cgroups, and nodes that are told apart by their ports only.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=40
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node-0 NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=1 State=UNKNOWN
NodeName=node-1 NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=40
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF

# A daemon under a host name of its own, and with our host table.
on() {
    local name=$1
    shift
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --uts --mount bash -c 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; shift 2; exec "$@"' \
        bash "$name" "$place" "$@" >>"$place/$name.log" 2>&1 &
    pids+=("$!")
}

(umask 077 && head -c 128 /dev/urandom >"$place/munge.key")
munged --foreground --force --socket "$place/munge.socket" --key-file "$place/munge.key" --pid-file "$place/munged.pid" \
    --seed-file "$place/munge.seed" >"$place/munged.log" 2>&1 &
pids+=("$!")
on controller slurmctld -D -c
for node in "${nodes[@]}"; do on "$node" slurmd -D -N "$node"; done

ready() { [[ $(sinfo --noheader --partition low --states idle --format %D 2>/dev/null) == "${#nodes[@]}" ]]; }
for ((tries = 0; tries < 300; tries++)); do
    ready && break
    for pid in "${pids[@]}"; do
        kill -0 "$pid" 2>/dev/null || { tail -n 20 "$place"/*.log >&2; say "a daemon has ended"; exit 1; }
    done
    sleep 0.1
done
ready || { tail -n 20 "$place"/*.log >&2; say "the nodes did not come up within 30 s"; exit 1; }

status=0
"${@:-${SHELL:-bash}}" || status=$?
scancel --user root 2>/dev/null || true
for ((tries = 0; tries < 600; tries++)); do # what still ran is over before its node is
    [[ -n $(squeue --noheader 2>/dev/null) ]] || break
    sleep 0.1
done
exit "$status"
