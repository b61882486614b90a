"""The benchmark of the consolidated model: what it prints, and that both files are the same before it does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import consolidate
from benchmarks.consolidate import CASES, Both, main, render
from shardckpt.testing.pool import ProcessPool


def test_a_table_of_both() -> None:
    turns = {
        "shardckpt": [{"seconds": s, "peaks": [40 << 20, 1 << 20]} for s in (1.0, 2.0, 4.0)],
        "torch": [{"seconds": s, "peaks": [900 << 20, 500 << 20]} for s in (3.0, 6.0, 5.0)],
    }
    table = render("a case", {"turns": turns, "nbytes": 1_500_000_000, "tensors": 12, "largest": 62 << 20})
    assert "**a case**: 1.50 GB in 12 tensors, the largest 62 MiB; 3 rounds" in table
    assert "| shardckpt | 2.00 (1.00-4.00) | 1.00 x | 40 (40-40) | 1 (1-1) |" in table
    assert "| torch | 5.00 (3.00-6.00) | 2.50 x | 900 (900-900) | 500 (500-500) |" in table


@pytest.mark.parametrize("wrong", ["name", "bits"])
def test_files_that_differ_are_no_measurement(tmp_path: Path, wrong: str) -> None:
    both = Both(torch.nn.Linear(2, 2), tmp_path)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        key, bits = ("w", 1) if name == "ours" or wrong == "bits" else ("v", 1)
        tensor = torch.full((3,), bits + (name == "theirs" and wrong == "bits"), dtype=torch.int16).view(torch.bfloat16)
        torch.save({"model": {key: tensor}}, tmp_path / name / "model.pt")
    with pytest.raises(AssertionError):
        both.compare()


def job_on_rank(rank: int, world_size: int, folder: Path, task: consolidate.Task, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", **{key: str(place[key]) for key in place}}):
        assert main(["--job", json.dumps(asdict(task))]) == 0


def whole_command(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--gb", "0", "--rounds", "1", "--cases", next(iter(CASES)), "--root", str(root)]) == 0
    printed = capfd.readouterr().out
    assert "| shardckpt |" in printed
    assert "| torch |" in printed
    assert not list(root.iterdir())


def test_two_ranks(
    ranks: ProcessPool,
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def start(task: consolidate.Task) -> dict[str, Any]:
        ranks.run(2, job_on_rank, task, free_port, backend=None)
        found: dict[str, Any] = json.loads((Path(task.folder) / "result.json").read_text())
        return found

    monkeypatch.setattr(consolidate, "_start", start)
    whole_command(tmp_path, capfd)


@pytest.mark.larger
@pytest.mark.slow
@pytest.mark.timeout(400)  # a start of torchrun; half a minute on a machine that is busy
def test_two_ranks_that_torchrun_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of the ranks is `python -m benchmarks.consolidate`, too."""
    whole_command(tmp_path, capfd)
