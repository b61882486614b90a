#!/usr/bin/env bash
# Everything that must hold before a change lands, from nothing: style, types, scripts, tests. Runs all parts, whatever fails.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]        for instance: bash launch/test.sh tests/gang -k timeout
#
# The last line counts tests, and each failed part beside them as one failed test; the exit status is 0 if none failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash launch/setup.sh || exit
PATH=$PWD/.venv/bin:$PATH
unset PYTHONDONTWRITEBYTECODE # or each of the hundred processes that tests start compiles the package anew
results=$(mktemp -d) || exit
types= # the process that looks at them
trap '[[ ! $types ]] || kill "$types" 2>/dev/null; rm -rf "$results"' EXIT
failed=()

part() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

types_hold() {
    wait "$types"
    local status=$?
    types=
    cat "$results/mypy"
    return "$status"
}

count() {
    python - "$results/tests.xml" "${failed[@]}" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

file, *parts = sys.argv[1:]
counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
if Path(file).exists():
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in counts}
bad = counts["failures"] + counts["errors"]
others = [name for name in parts if name != "pytest" or not bad]
if parts:
    print("failed parts:", ", ".join(parts))
passed = counts["tests"] - bad - counts["skipped"]
print(f"{max(passed, 0)} passed, {bad + len(others)} failed, {counts['skipped']} skipped")
PY
}

part "ruff check" ruff check
part "ruff format" ruff format --check
# Types are looked at beside the tests, which wait for deadlines, servers and disks nearly half of their time. That is why
# there are three workers for two cores, too.
mypy -p shardckpt -p benchmarks -p tests >"$results/mypy" 2>&1 &
types=$!
part "shellcheck" shellcheck -x launch/*.sh launch/*/*.sh launch/slurm/train.sbatch docker/*.sh .ci/run
part "pytest" env OMP_NUM_THREADS=1 python -m pytest -n 3 --junitxml="$results/tests.xml" "$@"
part "mypy" types_hold
printf '\n'
count
((${#failed[@]} == 0))
