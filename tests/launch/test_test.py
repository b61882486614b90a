"""launch/test.sh: runs every part whatever fails, and its last line and exit status tell the truth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT

PASSING = "def test_a(): pass\n"
MIXED = "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
BROKEN = "import nothing_of_this_name\n"


def run(folder: Path, tests: str, *, failing: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a project of one test file, with tools that succeed, but for `failing`."""
    for name in ("launch", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "launch/test.sh", folder / "launch")
    (folder / "launch/setup.sh").write_text("")
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    programs = {name: f"echo {name} has looked; exit {int(name == failing)}" for name in ("ruff", "mypy", "shellcheck")}
    programs["python"] = f'exec "{sys.executable}" "$@"'
    for name, body in programs.items():
        (folder / ".venv/bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        ["bash", "launch/test.sh", "-n", "0"], cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("tests", "failing", "last", "parts"),
    [
        (PASSING, "", "1 passed, 0 failed, 0 skipped", ""),
        (PASSING, "ruff", "1 passed, 2 failed, 0 skipped", "ruff check, ruff format"),
        (MIXED, "shellcheck", "1 passed, 2 failed, 1 skipped", "shellcheck, pytest"),
        (PASSING, "mypy", "1 passed, 1 failed, 0 skipped", "mypy"),
        (BROKEN, "", "0 passed, 1 failed, 0 skipped", "pytest"),
        ("", "", "0 passed, 1 failed, 0 skipped", "pytest"),
    ],
)
def test_the_end_tells_the_truth(tmp_path: Path, tests: str, failing: str, last: str, parts: str) -> None:
    done = run(tmp_path, tests, failing=failing)
    lines = done.stdout.splitlines()
    assert lines[-1] == last, done.stdout + done.stderr
    assert done.returncode == int(bool(parts))
    assert (f"failed parts: {parts}" in lines) == bool(parts)
    assert lines[lines.index("== mypy") + 1] == "mypy has looked"
    assert [line for line in lines if line.startswith("== ")] == [
        f"== {part}" for part in ("ruff check", "ruff format", "shellcheck", "pytest", "mypy")
    ]


def test_ci_runs_the_same_script(tmp_path: Path) -> None:
    for name in (".ci", "launch"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "launch/test.sh").write_text("echo ran with $# arguments; exit 3\n")
    done = subprocess.run(["bash", tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "ran with 0 arguments\n")
