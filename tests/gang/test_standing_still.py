"""Rank 0 is stopped (SIGSTOP, a machine that hangs) while it waits: what it then finds is no agreement.

And a rank is stopped while it has the store locked, which is a file: nobody else's process stands still with it.
"""

from __future__ import annotations

import fcntl
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.errors import GangError
from shardckpt.gang.gangs import Gangs
from shardckpt.gang.local import LocalGang
from shardckpt.gang.together import together, together_gather
from shardckpt.gang.wire import vain
from shardckpt.testing.gang_acts import LONG, await_marks, go_on, mark
from shardckpt.testing.pool import ProcessPool


class Stopped(LocalGang):
    """Rank 0 of two. The other has said long ago what rank 0 hears when it goes on."""

    def __init__(self, clock: list[float], stop_s: float) -> None:
        super().__init__()
        self._clock, self._stop_s = clock, stop_s
        self.told: list[Any] = []

    @property
    def size(self) -> int:
        return 2

    def gather(self, value: Any, *, timeout: Any, fold: Any = None) -> Any:
        self._clock[0] += self._stop_s
        return [value, [[], "there"]]

    def broadcast(self, value: Any, *, timeout: Any) -> Any:
        self.told.append(value)
        return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    still = SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]})
    for module in (import_module("shardckpt.gang.together"), vain):
        monkeypatch.setattr(module, "time", still)
    return now


def test_rank_0_that_stood_still_until_the_others_had_given_up_does_not_go_on_alone(clock: list[float]) -> None:
    gang = Stopped(clock, 3600.0)
    for act in (together, together_gather):
        with pytest.raises(GangError, match=r"only after 3\.6e\+03 s, when they had given up") as caught:
            act(gang, lambda: "here", phase="write", timeout=LONG)
        assert [*caught.value.failures] == [0]
    assert all(told is not None for told in gang.told), "who still listens hears of it"


def test_what_comes_while_the_others_still_listen_counts(clock: list[float]) -> None:
    gang = Stopped(clock, LONG.total_seconds() + 1.0)
    assert together_gather(gang, lambda: "here", phase="write", timeout=LONG) == ["here", "there"]
    assert gang.told == [None]


def leave_while_the_file_is_locked(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    gangs = Gangs.from_env()
    go_on(gangs.root)
    if rank == 0:
        await_marks(folder, "locked", 1)
        gangs.close()
        mark(folder, "left", rank)
    else:
        with (folder / "store").open("rb") as store:
            fcntl.flock(store, fcntl.LOCK_EX)
            mark(folder, "locked", rank)
            await_marks(folder, "left", 1)
        gangs.close()
    dist.destroy_process_group()


def test_who_leaves_does_not_wait_for_the_file_that_another_has_locked(ranks: ProcessPool) -> None:
    ranks.run(2, leave_while_the_file_is_locked, backend=None)
