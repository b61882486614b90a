"""The examples run: Python blocks of Markdown files that say so, and those in docstrings."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.docs import Example, examples
from tests.house.source import ROOT, Source, sources

RUNNABLE = [example for example in examples(ROOT, "README.md") if example.mark == "run"]
WITH_EXAMPLES = [source for source in sources(ROOT, "shardckpt") if ">>> " in source.text]


@pytest.mark.parametrize("example", RUNNABLE, ids=lambda example: example.place)
def test_examples_of_the_readme_run(example: Example, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", example.code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("source", WITH_EXAMPLES, ids=lambda source: source.path)
def test_examples_in_docstrings_run(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(".".join(source.parts))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
