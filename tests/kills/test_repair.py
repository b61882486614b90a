"""Whoever repairs is killed before, or right after, any of its operations: what was there is there, or what it makes.

The next repair comes to the same end. Crash states of a repair, with what a power cut takes, are in `tests/crash`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import shardckpt as sc
from shardckpt.format.layout import MANIFEST, aside_folder
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import flip_byte
from shardckpt.testing.pool import Outcome, ProcessPool, RankLostError
from tests.scorecard import Scale, Scorecard
from tests.tools.making import assert_loads, save

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600)]

T = TypeVar("T")


def lose_record(run: Path) -> None:
    (run / "step_2" / MANIFEST).unlink()


def flip_a_bit(run: Path) -> None:
    record = bytearray((run / "step_2" / MANIFEST).read_bytes())
    record[50] ^= 8
    (run / "step_2" / MANIFEST).write_bytes(record)


def tear_record(run: Path) -> None:
    os.truncate(run / "step_2" / MANIFEST, 100)


def undo_commit(run: Path) -> None:
    """As a save leaves it that is killed just before its commit."""
    attempt = Catalog(LocalStorage(run)).record(2)[1].attempt
    lose_record(run)
    (run / "step_2").rename(run / aside_folder(2, attempt, "tmp"))


def damage_file(run: Path) -> None:
    flip_byte(run / "step_2/model.pt", 200)


KINDS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "record lost": (lose_record, "rebuild record", True),
    "record with a flipped bit": (flip_a_bit, "mend record", True),
    "record torn": (tear_record, "rebuild record", True),
    "attempt": (undo_commit, "commit attempt", True),
    "file damaged": (damage_file, "set aside", False),
}
"""What has happened, what repair does, and whether step 2 is in force afterwards."""


READING = {"list", "read", "read_into", "size"}
NEVER = -1


class Deadly(StorageWrapper):
    """Its process is killed at a moment; those before and after each operation are counted."""

    def __init__(self, inner: Storage, number: int) -> None:
        super().__init__(inner)
        self.moments: list[str] = []
        """By number, the name of the operation."""
        self._number, self._lock = number, threading.Lock()

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        self._pass(operation.name)
        result = call()
        self._pass(operation.name)
        return result

    def _pass(self, name: str) -> None:
        with self._lock:
            if len(self.moments) == self._number:
                os.kill(os.getpid(), signal.SIGKILL)
            self.moments.append(name)


def repair_and_die(rank: int, size: int, folder: Path, run: Path, number: int) -> list[str]:
    """All moments that there were, if it has come to its end."""
    storage = Deadly(LocalStorage(run), number)
    assert sc.repair(storage, step=2, apply=True).applied
    return storage.moments


def content(run: Path) -> list[bytes]:
    """Of all files, whatever their names."""
    return sorted(path.read_bytes() for path in run.rglob("*") if path.is_file())


def judge(run: Path, before: list[bytes], kind: str) -> None:
    """No byte of what was there is lost but for a bad record, step 1 is whole, and step 2 is whole if it is sound."""
    _, does, comes_back = KINDS[kind]
    left = content(run)
    assert all(left.count(each) >= before.count(each) for each in before)
    assert sc.verify(run, step=1).ok
    assert_loads(run, 1)
    report = sc.repair(run, step=2, apply=True) if comes_back or (run / "step_2").exists() else None
    assert report is None or report.kind in (does, "nothing")
    assert Catalog(LocalStorage(run)).steps() == ([1, 2] if comes_back else [1])
    if comes_back:
        assert_loads(run, 2)
    save(run, 2)
    assert_loads(run, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(2)
def test_a_repair_is_killed(ranks: ProcessPool, tmp_path: Path, kind: str, scale: Scale, scorecard: Scorecard) -> None:
    saved = tmp_path / "saved"
    save(saved, 1, 2)
    KINDS[kind][0](saved)
    before = content(saved)

    def repair(number: int) -> Outcome:
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        (outcome,) = ranks.run_settled(1, repair_and_die, run, number, backend=None)
        judge(run, before, kind)
        shutil.rmtree(run)
        return outcome

    moments = repair(NEVER).value
    changing = [number for number, name in enumerate(moments) if name not in READING]
    others = [number for number, name in enumerate(moments) if name in READING]
    assert changing
    some = random.Random(1).sample(others, min(len(others), scale.runs(sample=4, full=len(others))))
    for number in sorted([*changing, *some]):
        assert isinstance(repair(number).error, RankLostError), (number, moments)
        scorecard.add("SIGKILL of a repair, before and after its operations", runs=1, notes=kind)
