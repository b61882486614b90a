from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.forks import Forks

pytestmark = pytest.mark.xdist_group("huggingface")


def total(rank: int, world_size: int, folder: Path, factor: int) -> tuple[float, bool, str]:
    value = torch.tensor(float(rank + 1))
    if world_size > 1:
        dist.all_reduce(value)
    return value.item() * factor, "this" in sys.modules, os.environ.get("RANK", "")


def one_dies(rank: int, world_size: int, folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def one_raises(rank: int, world_size: int, folder: Path) -> int:
    if rank == 0:
        raise ValueError("rank 0 does not like it")
    return 7


def hangs(rank: int, world_size: int, folder: Path) -> None:
    signal.pause()


def test_ranks_have_what_was_imported_before_and_a_group(forks: Forks) -> None:
    assert forks.run(2, total, 10, preload=["this"]) == [(30.0, True, "0"), (30.0, True, "1")]
    assert forks.run(1, total, 10) == [(10.0, True, "")]


def test_a_killed_rank_takes_the_others_with_it(forks: Forks) -> None:
    assert [one.killed for one in forks.run_settled(2, one_dies)] == [signal.SIGKILL] * 2


def test_an_exception_is_told_with_its_traceback(forks: Forks) -> None:
    with pytest.raises(AssertionError, match="rank 0 does not like it"):
        forks.run(2, one_raises, timeout=5)


def test_what_hangs_is_ended(forks: Forks) -> None:
    assert [one.killed for one in forks.run_settled(1, hangs, timeout=0.2)] == [signal.SIGKILL]
