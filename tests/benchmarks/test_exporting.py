"""The benchmark of exports: all its ways give the same tensors, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import exporting


def test_all_ways_of_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_WIDTH", 64)
    nbytes = exporting._prepare(tmp_path, 3 * 4 * 64 * 64)
    turns = {way: [exporting._measured(way, tmp_path, tmp_path / f"{way}.out")] for way in exporting.WAYS}
    exporting._compare(tmp_path)
    lines = exporting.render(nbytes, turns).splitlines()
    assert lines[1] == "0.00 GB of tensors, step of 2 ranks; 1 rounds"
    assert [line.split("|")[1].strip() for line in lines[5:]] == list(exporting.WAYS)
