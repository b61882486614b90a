"""Ranks as threads of one process: the way to test distributed code in milliseconds."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Generic, TypeVar

from shardckpt.gang.gangs import Gangs
from shardckpt.gang.store import StoreGang
from shardckpt.gang.wire.mailbox import Store

_T = TypeVar("_T")

_LIMIT = timedelta(seconds=60)


class RanksError(Exception):
    """Some ranks raised, or did not end: `errors` by rank. The message holds the traceback of each."""

    def __init__(self, errors: Mapping[int, BaseException]) -> None:
        self.errors = dict(errors)
        summary = "; ".join(f"rank {rank}: {type(error).__name__}" for rank, error in errors.items())
        traces = [
            f"--- rank {rank}\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__))
            for rank, error in errors.items()
        ]
        super().__init__("\n".join([summary, *traces]))


class RankHungError(Exception):
    """This rank did not end within the time allowed; the message shows where it was."""


def run_ranks(world_size: int, act: Callable[[Gangs], _T], *, tp: int = 1, timeout: timedelta = _LIMIT) -> list[_T]:
    """Run `act` in a thread per rank, each with the gangs of its rank; returns the results in rank order.

    Raises `RanksError` if any rank raised or did not end within `timeout` (its thread is then left behind).
    """
    settled = run_ranks_settled(world_size, act, tp=tp, timeout=timeout)
    errors = {rank: outcome for rank, outcome in enumerate(settled) if isinstance(outcome, BaseException)}
    if errors:
        raise RanksError(errors)
    return [outcome for outcome in settled if not isinstance(outcome, BaseException)]


def run_ranks_settled(
    world_size: int, act: Callable[[Gangs], _T], *, tp: int = 1, timeout: timedelta = _LIMIT
) -> list[_T | BaseException]:
    """As `run_ranks`, with the exception of each rank that raised in the place of its result."""
    import torch.distributed as dist

    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    return run_threads(world_size, lambda rank: _with_gangs(act, store, rank, (world_size, tp)), timeout=timeout)


def run_threads(world_size: int, act: Callable[[int], _T], *, timeout: timedelta = _LIMIT) -> list[_T | BaseException]:
    """Run `act(rank)` in a thread per rank; results or exceptions in rank order, `RankHungError` for one that hangs."""
    runs = [_Run(rank, act) for rank in range(world_size)]
    for run in runs:
        run.thread.start()
    end = time.monotonic() + timeout.total_seconds()
    return [run.outcome(end) for run in runs]


class _Run(Generic[_T]):
    def __init__(self, rank: int, act: Callable[[int], _T]) -> None:
        self._rank = rank
        self._act = act
        self._outcome: _T | BaseException
        self.thread = threading.Thread(target=self._run, name=f"rank-{rank}", daemon=True)

    def _run(self) -> None:
        try:
            self._outcome = self._act(self._rank)
        except BaseException as error:
            self._outcome = error

    def outcome(self, end: float) -> _T | BaseException:
        self.thread.join(timeout=max(0.0, end - time.monotonic()))
        if not self.thread.is_alive():
            return self._outcome
        frame = sys._current_frames().get(self.thread.ident or 0)
        where = "".join(traceback.format_stack(frame)) if frame is not None else "(it has just ended)"
        return RankHungError(f"rank {self._rank} did not end in time; it was here:\n{where}")


def _with_gangs(act: Callable[[Gangs], _T], store: Store, rank: int, shape: tuple[int, int]) -> _T:
    size, tp = shape
    if size == 1:
        return act(Gangs.local())
    root = StoreGang(lambda: store, rank=rank, size=size, nonce="ranks")
    gangs = Gangs.of(root, tp=tp)
    try:
        return act(gangs)
    finally:
        gangs.close()
