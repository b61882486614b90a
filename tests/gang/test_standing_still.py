"""Rank 0 is stopped (SIGSTOP, a machine that hangs) while it waits: what it then finds is no agreement."""

from __future__ import annotations

import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from shardckpt.errors import GangError
from shardckpt.gang.local import LocalGang
from shardckpt.gang.together import together, together_gather
from shardckpt.gang.wire import vain
from shardckpt.testing.gang_acts import LONG


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
