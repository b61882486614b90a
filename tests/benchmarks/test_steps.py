"""The benchmark of very many steps, small."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from benchmarks import steps


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def test_requests_of_a_run_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--steps", "30", "--places", "memory", "disk"]) == 0
    shown = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:]
        for line in shown.splitlines()
        if (cells := [each.strip() for each in line.split("|")][1:-1])
    }
    counts = {name: [cell.split()[0] for cell in cells] for name, cells in rows.items() if "(" in "".join(cells)}
    assert counts["newest step (`latest`)"] == ["2", "2", "2"]
    assert counts["all steps (`steps()`)"] == ["31", "31", "31"]
    assert counts["after a save, keep all"] == ["0", "0", "0"]
    assert counts["dead attempts, first look"] == ["1", "32", "1"]
