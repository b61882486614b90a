"""Many saves, of which every other one fails, somewhere: what the process holds stays level, and so does the disk."""

from __future__ import annotations

import errno
import gc
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from tests.scorecard import Scale, Scorecard

T = TypeVar("T")

LIMIT = timedelta(seconds=30)
GROWTH = 4 << 20
"""Bytes that the process may have grown by since: pages of Python's and of malloc's own."""
CALLS = 9
"""Of the storage, in a save that succeeds, or fewer."""


class Sick(StorageWrapper):
    """Fails the n-th call, before or after it is done; and with it whatever removes the attempt, now and then."""

    left = 0
    done = False

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        self.left -= 1
        if self.left == 0:
            if self.done:
                call()
            raise OSError(errno.ENOSPC, "no space left")
        return call()


@dataclass(frozen=True)
class Held:
    threads: tuple[str, ...]
    files: int
    processes: int
    shared: tuple[str, ...]
    temporary: int


def held() -> Held:
    gc.collect()
    threads = tuple(sorted(thread.name for thread in threading.enumerate()))
    mine = tuple(name for name in os.listdir("/dev/shm") if str(os.getpid()) in name)
    children = len(psutil.Process().children(recursive=True))
    files = len(os.listdir("/proc/self/fd"))
    return Held(threads, files, children, mine, len(os.listdir(tempfile.gettempdir())))


def save_often(storage: Sick, root: Path, saves: int) -> tuple[int, list[Held], int]:
    """How many failed; what was held now and then, once it had settled; by how many bytes the process grew since."""
    chance, failures, levels, nbytes = random.Random(5), 0, list[Held](), list[int]()
    state: dict[str, Any] = {"model": {"w": torch.zeros(3000)}, "own": {"n": torch.zeros(3)}, "value": 0}
    with sc.CheckpointManager(storage, sc.Gangs.local(), keep=sc.KeepLast(2), timeout=LIMIT) as checkpoints:
        for step in range(1, saves + 1):
            storage.left, storage.done = chance.randrange(1, CALLS) if step % 2 else 0, chance.random() < 0.5
            state["value"] = step
            pending = checkpoints.save(step, state)
            try:
                pending.result(LIMIT)
            except sc.CheckpointSaveError:
                failures += 1
            checkpoints._saver._thread.join()  # and what comes after the commit
            if step >= saves // 2 and step % max(1, saves // 20) == 0:
                levels.append(held())
                nbytes.append(psutil.Process().memory_info().rss)
        last = checkpoints.latest()
        checkpoints.load(last, state)
        assert state["value"] == last == saves - saves % 2
    left = [name for name in os.listdir(root) if ".old" in name or ".tmp" in name or not name.startswith("step_")]
    assert len(left) <= 1, left  # of a removal that was made to fail itself
    return failures, levels, nbytes[-1] - nbytes[0]


@pytest.mark.crash
@pytest.mark.timeout(3600)
def test_every_other_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale, scorecard: Scorecard
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    saves = scale.runs(sample=60, full=1000)
    failures, levels, grown = save_often(Sick(LocalStorage(tmp_path / "run")), tmp_path / "run", saves)
    scorecard.add("saves, half of them failing", runs=saves, notes=f"{failures} of {saves} failed, {grown >> 10} KiB")
    assert failures > saves / 4
    assert set(levels) == {levels[0]}
    assert grown < GROWTH


class Careless(Sick):
    """Forgets a file at each failure."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.forgotten: list[Any] = []

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        try:
            return super().around(operation, call)
        except OSError:
            self.forgotten.append(open("/dev/null"))  # noqa: SIM115
            raise


def test_a_file_that_failures_leave_open_is_found(tmp_path: Path) -> None:
    storage = Careless(LocalStorage(tmp_path))
    _, levels, _ = save_often(storage, tmp_path, 40)
    assert len(set(levels)) > 1
    for file in storage.forgotten:
        file.close()
