"""Two jobs on one root at once, by mistake: each step is committed by one of them, whole, and neither harms the other.

Both save the same steps at the same time, and prune.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt as sc
from shardckpt.engine.committing import transaction
from shardckpt.format.layout import MANIFEST
from shardckpt.gang import StoreGang
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.gangs import run_threads
from tests.faults.test_overwrite import PLACES
from tests.scorecard import Scale, Scorecard

RANKS, JOBS = 2, 2
STEPS = 6
KEPT = 3
LIMIT = timedelta(seconds=30)


def state_of(job: int, rank: int, step: int) -> dict[str, Any]:
    code = float(100 * step + 10 * job)
    return {"model": {"w": torch.full((500,), code)}, "own": {"shard": torch.full((300,), code + rank)}, "value": job}


def job_of(state: dict[str, Any], rank: int, step: int) -> int:
    want = state_of(state["value"], rank, step)
    assert torch.equal(state["model"]["w"], want["model"]["w"]), state
    assert torch.equal(state["own"]["shard"], want["own"]["shard"]), state
    return int(state["value"])


@dataclass(frozen=True)
class Told:
    """What one rank of one job was told of the saves: by step, an error or that it is committed."""

    job: int
    errors: dict[int, sc.CheckpointError | None]


def play(place: Storage) -> list[Told]:
    stores: list[Any] = [dist.HashStore() for _ in range(JOBS)]  # type: ignore[attr-defined]
    at_once = threading.Barrier(RANKS * JOBS)

    def act(number: int) -> Told:
        job, rank = divmod(number, RANKS)
        root = StoreGang(lambda: stores[job], rank=rank, size=RANKS, nonce="job")
        gangs, errors = sc.Gangs.of(root), dict[int, sc.CheckpointError | None]()
        try:
            with sc.CheckpointManager(place, gangs, keep=sc.KeepLast(KEPT), timeout=LIMIT) as checkpoints:
                for step in range(1, STEPS + 1):
                    at_once.wait(60)
                    try:
                        checkpoints.save(step, state_of(job, rank, step), replicated=("model",)).result(LIMIT)
                        errors[step] = None
                    except sc.CheckpointError as error:
                        errors[step] = error
        except BaseException:
            at_once.abort()
            raise
        finally:
            gangs.close()
        return Told(job, errors)

    told = run_threads(RANKS * JOBS, act, timeout=timedelta(seconds=100))
    for number, outcome in enumerate(told):
        if isinstance(outcome, BaseException):
            raise AssertionError(f"rank {number % RANKS} of job {number // RANKS}") from outcome
    return [outcome for outcome in told if isinstance(outcome, Told)]


def winners(place: Storage) -> dict[int, int]:
    """By step that is offered, of which job it is, on all ranks."""
    found: dict[int, int] = {}
    stores: Any = dist.HashStore()  # type: ignore[attr-defined]

    def act(rank: int) -> dict[int, int]:
        gangs = sc.Gangs.of(StoreGang(lambda: stores, rank=rank, size=RANKS, nonce="after"))
        try:
            with sc.CheckpointManager(place, gangs, timeout=LIMIT) as checkpoints:
                jobs = {}
                for step in checkpoints.steps():
                    state = {"model": {"w": torch.zeros(500)}, "own": {"shard": torch.zeros(300)}, "value": None}
                    checkpoints.load(step, state)
                    jobs[step] = job_of(state, rank, step)
                return jobs
        finally:
            gangs.close()

    for jobs in run_threads(RANKS, act):
        assert not isinstance(jobs, BaseException), jobs
        assert not found or found == jobs
        found = jobs
    return found


def judge(place: Storage, told: list[Told]) -> None:
    for one, other in zip(told[::RANKS], told[1::RANKS], strict=True):
        assert [error is None for error in one.errors.values()] == [error is None for error in other.errors.values()]
    found = winners(place)
    committed = {step: {it.job for it in told if it.errors[step] is None} for step in range(1, STEPS + 1)}
    for step, jobs in committed.items():
        assert jobs, f"step {step} was committed by nobody: {[str(it.errors[step]) for it in told]}"
    assert set(range(STEPS - KEPT + 1, STEPS + 1)) <= set(found)
    for step, job in found.items():
        assert job in committed[step], f"step {step} is of job {job}, which was told that it is not committed"
    folders = [name for name in place.list() if MANIFEST in place.list(name)]
    if isinstance(place, RenamingStorage):
        assert [name for name in place.list() if ".tmp" in name] == []
    assert {f"step_{step}/" for step in found} <= set(folders)


@pytest.mark.crash
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", PLACES)
def test_two_jobs_at_once(tmp_path: Path, kind: str, scale: Scale, scorecard: Scorecard) -> None:
    rounds = scale.runs(sample=5, full=200)
    make: Callable[[Path], Storage] = PLACES[kind]
    for number in range(-(-rounds // len(PLACES))):
        place = make(tmp_path / str(number))
        judge(place, play(place))
        scorecard.add("two gangs on one root", runs=1)


@pytest.mark.crash
def test_that_attempts_share_a_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MemoryStorage.make_folder
    monkeypatch.setattr(transaction, "new_attempt", lambda: "0" * 32)
    monkeypatch.setattr(
        MemoryStorage, "make_folder", lambda self, prefix, exist_ok=False: real(self, prefix, exist_ok=True)
    )

    def several_rounds() -> None:
        for _ in range(20):
            place = MemoryStorage()
            judge(place, play(place))

    with pytest.raises((AssertionError, sc.CheckpointError)):
        several_rounds()
