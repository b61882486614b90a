"""The benchmark of exports: all its ways give the same tensors, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import exporting
from benchmarks.exportways import WAYS, compare, make_ready, prepare
from shardckpt.testing.gangs import run_ranks


def test_all_ways_of_a_small_model(tmp_path: Path) -> None:
    nbytes = prepare(tmp_path, 3 * 4 * 64 * 64, 64)
    assert nbytes == 3 * 4 * 64 * 64
    for number, (name, way) in enumerate(WAYS.items()):
        to = tmp_path / f"{number}.out"
        make_ready(tmp_path, way, cold=number % 2 == 0)
        run_ranks(way.ranks, lambda gangs, to=to, way=way: way.act(tmp_path, to, gangs))  # type: ignore[misc]
        if name not in ("copy", "cp"):
            compare(tmp_path, to)
    assert (tmp_path / "0.out/rank_0.pt").read_bytes() == (tmp_path / "run/step_1/rank_0.pt").read_bytes()
    other = load_file(tmp_path / "2.out/model.safetensors") | {"w1": torch.zeros(64, 64)}
    save_file(other, tmp_path / "2.out/model.safetensors")
    with pytest.raises(AssertionError, match="has other tensors"):
        compare(tmp_path, tmp_path / "2.out")


def test_a_table() -> None:
    turns = {
        "copy": [{"seconds": s, "peak": 32 << 20} for s in (1.0, 2.0, 4.0)],
        "export, pt": [{"seconds": s, "peak": 60 << 20} for s in (3.0, 1.0, 2.5)],
    }
    lines = exporting.render(1_500_000_000, turns, cold=True).splitlines()
    assert lines[1] == "1.50 GB of tensors, step of 2 ranks, read from the disk; 3 rounds"
    assert lines[5:] == [
        "| copy | 2.00 (1.00 to 4.00) | 1.00 | 32 |",
        "| export, pt | 2.50 (1.00 to 3.00) | 1.25 | 60 |",
    ]


@pytest.mark.slow
@pytest.mark.larger
@pytest.mark.timeout(300)
def test_ranks_in_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ways = ["copy", "export by 2 ranks, safetensors"]
    arguments = ["--gb", "0", "--width", "64", "--rounds", "1", "--root", str(tmp_path), "--ways", *ways]
    assert exporting.main(arguments) == 0
    assert "| export by 2 ranks, safetensors |" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())
