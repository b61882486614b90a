#!/usr/bin/env bash
# The image without Docker: built and run by Debian's buildah, for a machine on which no daemon runs. As root.
#
#   bash docker/without_docker.sh build      the image, on a Debian that debootstrap makes in place of the one it is FROM
#   bash docker/without_docker.sh demo       its default command
#   bash docker/without_docker.sh compose    the services of compose.yaml with their commands, at the loopback interface
#   bash docker/without_docker.sh jobset     the same store, and the pods' command of launch/kubernetes/jobset.yaml, twice
#
# Needs apt-get install buildah debootstrap, and .venv (launch/setup.sh). The folder WORK holds all that it makes.
# Environment: BUILD_OPTIONS, further options of `buildah bud`, such as "--build-arg TORCH_INDEX=https://...", or
# "--volume /a/pip.conf:/etc/pip.conf:ro", for packages that come from elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${WORK-${TMPDIR:-/tmp}/shardckpt-image}
image=localhost/shardckpt:compose
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot # both work where namespaces and mounts are restricted

run() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }

build() {
    local base container
    base=$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)
    mkdir -p "$work"
    if ! run inspect --type image "$base" >/dev/null 2>&1; then
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/debian" >"$work/debian.log"
        container=$(run from scratch)
        run add --quiet "$container" "$work/debian" / >/dev/null
        run commit --quiet "$container" "docker.io/library/$base" >/dev/null
        run rm "$container" >/dev/null
        rm -rf "$work/debian"
    fi
    # shellcheck disable=SC2086  # several options
    run bud --network host --build-arg EXTRAS=seaweed ${BUILD_OPTIONS-} -t "$image" -f docker/Dockerfile .
    run images
}

# A container in which the names of all services and of the pod with the meeting place lead to this machine.
container() {
    run rm compose >/dev/null 2>&1 || true
    run from --pull-never --name compose --add-host store:127.0.0.1 --add-host node-0:127.0.0.1 \
        --add-host node-1:127.0.0.1 --add-host train-node-0-0.train:127.0.0.1 "$image" >/dev/null
}

services() {
    : "${AWS_ACCESS_KEY_ID:?any name}" "${AWS_SECRET_ACCESS_KEY:?any secret}"
    export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
    local service status=0
    pids=()
    folder=$(mktemp -d)
    trap 'kill "${pids[@]}" 2>/dev/null; wait; rm -rf "$folder"' EXIT
    chmod 711 "$folder"
    # Per service a file of shell words, command and health check, and its environment, which is read only inside, by its
    # user, so that no command line shows a key.
    .venv/bin/python - "$1" "$folder" <<'PY'
import os, re, shlex, sys
import yaml

def filled(text):
    """With the environment's values, and the defaults of compose.yaml."""
    return re.sub(r"\$\{(\w+)(?:-|:\?)([^}]*)\}", lambda found: os.environ.get(found[1], found[2]), str(text))

def as_pods(services):
    """The nodes do what the pods of the JobSet do, with the store of compose."""
    job = yaml.safe_load(open("launch/kubernetes/jobset.yaml"))["spec"]["replicatedJobs"][0]["template"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    own = {each["name"]: each["value"] for each in container["env"]} | {"CHECKPOINTS": "s3://checkpoints"}
    for name in ("node-0", "node-1"):
        stores = {key: value for key, value in services[name]["environment"].items() if key.startswith("AWS_")}
        words = [re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], word) for word in container["command"] + container["args"]]
        services[name] |= {"environment": own | stores, "command": words}

services = yaml.safe_load(open("docker/compose.yaml"))["services"]
if sys.argv[1] == "jobset":
    as_pods(services)
for name, service in services.items():
    parts = {"command": service["command"], "check": service["healthcheck"]["test"][1:]}
    with open(f"{sys.argv[2]}/{name}", "w") as file:
        for part, words in parts.items():
            print(f"{part}=({shlex.join(map(filled, words))})", file=file)
    with open(f"{sys.argv[2]}/{name}.env", "w", opener=lambda path, flags: os.open(path, flags, 0o400)) as file:
        for key, value in service["environment"].items():
            print(f"export {key}={shlex.quote(filled(value))}", file=file)
    os.chown(file.name, 1000, 1000)
PY
    in_it() {
        # shellcheck disable=SC2016  # expanded inside
        run run --hostname "$service" --volume "$folder:/service:ro" -- compose \
            sh -c '. "/service/$0.env" && exec "$@"' "$service" "$@"
    }
    start() {
        local service=$1 command check
        # shellcheck disable=SC1090  # written above
        . "$folder/$service"
        in_it "${command[@]}" >"$folder/$service.log" 2>&1 &
        pids+=("$!")
    }
    healthy() {
        local service=$1 command check
        # shellcheck disable=SC1090
        . "$folder/$service"
        in_it "${check[@]}"
    }
    start store
    for ((tries = 0; tries < 60; tries++)); do
        if healthy store >/dev/null 2>&1; then break; fi
        sleep 1
    done
    start node-0
    start node-1
    wait "${pids[1]}" "${pids[2]}" || status=$?
    grep -h '^step' "$folder"/node-*.log | tail -n 3 || true
    ((status == 0)) || tail -n 30 "$folder"/*.log
    healthy node-0 || status=$?
    return "$status"
}

case ${1-} in
build) build ;;
demo) container && run run -- compose shardckpt demo ;;
compose | jobset) container && services "$1" ;;
*) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
