"""The plugin of the crash tests, in a pytest of its own: what is asked for arrives, what was counted is added up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT
from tests.scorecard import Row, Scale, Scorecard, examples

CASES = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

@pytest.mark.parametrize("n", range(4))
def test_states(n, scale, scorecard):
    runs = scale.runs(sample=10, full=1000)
    scorecard.add("crash states", runs=runs, torn=n == 3, notes="tiny | states")
    scorecard.add("kills", runs=1, lost=2)
    assert n != 3, "counted all the same"

@pytest.mark.sampled(3)
@pytest.mark.parametrize("n", range(7))
def test_table(n, scorecard):
    scorecard.add("table", runs=1)

@pytest.mark.larger
def test_more(scorecard):
    scorecard.add("table", runs=100)

@pytest.mark.parametrize("twice", range(2))
@settings(max_examples=90, deadline=None, database=None)
@given(number=st.integers())
def test_property(scorecard, twice, number):
    scorecard.add("examples", runs=1)
"""


def run(folder: Path, *arguments: str) -> str:
    (folder / "conftest.py").write_text("pytest_plugins = ['tests.scorecard']\n")
    (folder / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"-opythonpath={ROOT}", *arguments]
    done = subprocess.run([*command, "--scorecard", "card.md"], cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    return (folder / "card.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "runs"), [((), "40"), (("--scale", "2.5", "-n", "2"), "100"), (("--scale", "full"), "4,000")]
)
def test_rows_are_added_up(tmp_path: Path, arguments: tuple[str, ...], runs: str) -> None:
    text = run(tmp_path, *arguments)
    assert f"| crash states | {runs} | 1 | 0 | 0 | 0 | 0 | tiny \\| states |\n" in text
    assert f"| table | {107 if arguments else 3} | 0 |" in text
    assert f"| examples | {180 if arguments else 60} | 0 |" in text
    assert "| kills | 4 | 0 | 8 | 0 | 0 | 0 |  |\n" in text
    assert f"scale {arguments[1] if arguments else 1}, " in text
    assert "1 tests failed" in text


def test_the_same_note_is_noted_once() -> None:
    card = Scorecard()
    for notes in ("a", "b", "a; b", ""):
        card.add("row", runs=1, notes=notes)
    assert card.rows == {"row": Row("row", runs=4, notes="a; b")}


def test_how_many_examples_of_a_property() -> None:
    assert [examples(whole) for whole in (5, 25, 60, 90, 300)] == [5, 25, 25, 30, 100]


def test_something_is_always_run() -> None:
    assert Scale(0.001).runs(sample=5, full=10) == 1
    assert Scale(None).runs(sample=5, full=10) == 10
