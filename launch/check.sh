#!/usr/bin/env bash
# Runs every starter for real, as far as one machine can: what stands in the manifests, with kills; Ray Train; a Slurm
# cluster; the image and compose's services. About 25 minutes on two idle cores. On Debian, as root.
#
#   bash launch/check.sh [PART...]        tests, ray, slurm, image; all of them if none is named
#
# What a part needs and is not there, it says, and fails: apt-get install slurm-wlm munge buildah debootstrap. Ray comes by
# pip into an environment of its own, CHECK_RAY (./.venv.ray if not said). docker/without_docker.sh has more settings,
# and SHARDCKPT_TEST_CRDS may name a folder with the definitions that Kubernetes' extensions publish (test_manifests.py).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash launch/setup.sh || exit
parts=("$@")
(($#)) || parts=(tests ray slurm image)
export SHARDCKPT_TEST_LAUNCH=1 OMP_NUM_THREADS=1
# Of the store that the part `image` starts and ends.
export AWS_ACCESS_KEY_ID=check AWS_SECRET_ACCESS_KEY=${RANDOM}x${RANDOM}x${RANDOM}
failed=()

ray_environment() {
    ray=${CHECK_RAY-$PWD/.venv.ray}
    [[ -x $ray/bin/ray ]] && return
    .venv/bin/python -m venv "$ray" || return
    # What is installed in .venv is seen from it.
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
        tee "$("$ray/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth" >/dev/null
    "$ray/bin/pip" install --quiet -c docker/constraints.txt 'ray[train]==2.60.0'
}

check() {
    case $1 in
    tests) .venv/bin/python -m pytest -p no:cacheprovider tests/launch/test_starters.py tests/launch/test_manifests.py \
        tests/launch/test_starts.py ;;
    ray) ray_environment && "$ray/bin/python" -m pytest -p no:cacheprovider tests/launch/test_ray.py ;;
    slurm) .venv/bin/python -m pytest -p no:cacheprovider tests/launch/test_slurm.py ;;
    image)
        for step in build demo compose jobset; do bash docker/without_docker.sh "$step" || return; done
        ;;
    *) echo "there is no part $1" >&2 && return 2 ;;
    esac
}

for part in "${parts[@]}"; do
    printf '\n== %s\n' "$part"
    SECONDS=0
    if check "$part"; then echo "$part: good, $SECONDS s"; else failed+=("$part"); fi
done
printf '\n%s\n' "${failed[*]:+failed: ${failed[*]}}"
((${#failed[@]} == 0))
