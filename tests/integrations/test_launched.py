"""The examples of `launch/` for trainers of others: begun, and gone on with."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

import shardckpt as sc
from tests.house.source import ROOT
from tests.integrations.forks import Forks


def run_example(rank: int, world_size: int, folder: Path, name: str, arguments: list[str]) -> str:
    """What it prints."""
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(ROOT / "launch" / name), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize(
    ("name", "first", "then", "newest"),
    [
        pytest.param("train_lightning.py", 1, 2, 100, marks=pytest.mark.xdist_group("lightning")),
        pytest.param("train_titan.py", 30, 60, 60, marks=pytest.mark.xdist_group("titan")),
    ],
)
def test_examples_begin_and_go_on(forks: Forks, tmp_path: Path, name: str, first: int, then: int, newest: int) -> None:
    begun, gone_on = (forks.run(1, run_example, name, [str(tmp_path), str(n)])[0] for n in (first, then))
    assert f"{'epoch 0' if 'lightning' in name else 'step 20'} loss" in begun
    last = "epoch 1 loss" if "lightning" in name else "step 60 loss"
    assert last in gone_on
    assert last not in begun
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as checkpoints:
        assert checkpoints.latest() == newest
