"""Four ranks as threads, each with its own view of one storage, and what the rows of the fault table share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.gangs import run_ranks_settled

PATIENT = timedelta(seconds=30)
"""For rows in which nobody hangs: a busy machine must not look like a rank that does."""
SHORT = timedelta(seconds=3)
"""For rows in which a rank does hang, and the others are to notice."""
RANKS = 3
PLACES = ("memory", "objects", "local")


def make_place(kind: str, folder: Path) -> Storage:
    if kind == "local":
        return LocalStorage(folder)
    return MemoryStorage() if kind == "memory" else MemoryObjects()


def make_state(rank: int, step: int) -> dict[str, Any]:
    """Some of it for the rank alone, some alike, one tensor large enough to begin on a page."""
    stream = torch.Generator().manual_seed(step)  # threads share torch's own
    shared = {"weight": torch.randn(64, 300, generator=stream), "bias": torch.randn(3, generator=stream)}
    return {"model": shared, "own": {"position": torch.full((5,), rank + 10 * step)}, "value": [rank, step]}


def at_once(rows: Iterable[Callable[[], None]]) -> None:
    """Run rows that wait for most of their time; what the first of them that failed has raised, with its number."""
    rows = list(rows)
    with ThreadPoolExecutor(len(rows), thread_name_prefix="row") as threads:
        runs = [threads.submit(row) for row in rows]
    for number, run in enumerate(runs):
        if (error := run.exception()) is not None:
            raise AssertionError(f"row {number}: {error}") from error


def blank_state(rank: int) -> dict[str, Any]:
    state = make_state(rank, 77)
    state["value"] = None
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["value"] == other["value"] and all(
        torch.equal(value, other[part][key]) for part in ("model", "own") for key, value in one[part].items()
    )


@dataclass
class Outcome:
    """What one rank saw of the save that was to fail."""

    error: BaseException | None
    seconds: float
    after: dict[str, Any] = field(default_factory=dict)


Fault = Callable[[int, Storage], Storage]
"""Gives the storage as that rank sees it."""


def run_row(
    place: Storage,
    fault: Callable[[sc.CheckpointManager, int], None],
    *,
    view: Fault = lambda rank, storage: storage,
    spoil: Callable[[dict[str, Any], int], None] = lambda state, rank: None,
    before_retry: Callable[[int], None] = lambda rank: None,
    deadline: timedelta = PATIENT,
) -> list[Outcome]:
    """Step 1 is saved; step 2 meets the fault; then 1 must load, and 2 and 3 must save and load. On every rank."""

    def act(gangs: sc.Gangs) -> Outcome:
        rank = gangs.root.rank
        manager = sc.CheckpointManager(view(rank, place), gangs, timeout=deadline)
        with manager as checkpoints:
            first = make_state(rank, 1)
            checkpoints.save(1, first, replicated=("model",)).result()
            fault(checkpoints, rank)
            state = make_state(rank, 2)
            spoil(state, rank)
            began = time.monotonic()
            outcome = Outcome(_failure_of(checkpoints, state), 0.0)
            outcome.seconds = time.monotonic() - began
            before_retry(rank)
            outcome.after = {"steps": checkpoints.steps()}
            for step in (1, 2, 3):
                if step > 1:
                    checkpoints.save(step, make_state(rank, step), replicated=("model",)).result()
                loaded = blank_state(rank)
                checkpoints.load(step, loaded)
                outcome.after[step] = same(loaded, make_state(rank, step))
        return outcome

    settled = run_ranks_settled(RANKS, act, timeout=timedelta(seconds=60))
    for rank, outcome in enumerate(settled):
        if isinstance(outcome, BaseException):
            raise AssertionError(f"rank {rank}") from outcome
    return settled  # type: ignore[return-value]


def _failure_of(checkpoints: sc.CheckpointManager, state: dict[str, Any]) -> BaseException | None:
    try:
        checkpoints.save(2, state, replicated=("model",)).result(timedelta(seconds=30))
    except BaseException as error:
        return error
    return None


class Trap:
    """A part of the state that does something when it is asked for its state: before the ranks meet."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def state_dict(self) -> dict[str, Any]:
        self._act()
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
