"""The table of failures in the field names tests that are there."""

from __future__ import annotations

import ast
import re

from tests.house.source import ROOT

_TEST = re.compile(r"`([a-z0-9_/]+\.py)::(test_\w+)`")


def missing(text: str) -> list[str]:
    """The tests that a table names and that are not there."""
    return [f"{file}::{name}" for file, name in _TEST.findall(text) if name not in _tests_of(file)]


def _tests_of(file: str) -> set[str]:
    path = ROOT / "tests" / file
    nodes = ast.walk(ast.parse(path.read_text())) if path.is_file() else ()
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_test_of_the_table_exists() -> None:
    text = (ROOT / "tests" / "FIELD.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) > 10
    assert all(_TEST.search(row) for row in rows)
    assert not missing(text)


def test_a_test_that_is_not_there_is_found() -> None:
    assert missing("`house/test_field.py::test_of_nothing`, `none.py::test_x`") == [
        "house/test_field.py::test_of_nothing",
        "none.py::test_x",
    ]
