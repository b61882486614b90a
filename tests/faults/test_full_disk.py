"""The disk is full after every possible number of pages, or of files: the save fails and says so, the older step stays.

On a tmpfs, of which all is taken but so much. Whatever the job still finds free, its save commits or leaves nothing,
and once there is room the next one commits. What a save needs at most is the least with which it commits.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.saving import share
from shardckpt.storage.posix import choose, write
from shardckpt.testing.gangs import run_ranks
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.root, pytest.mark.crash, pytest.mark.timeout(3600)]

RANKS = 2
PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES, INODES = 400, 100
"""Of the file system. More than twice what a checkpoint takes."""
LIMIT = timedelta(seconds=30)


@dataclass(frozen=True)
class Case:
    step: int = 2
    """What is saved when the disk is full: the next step, or 1 again."""
    of: str = "pages"
    """What there is too little of."""
    reserves: bool = True
    """Whether the file system can be asked for blocks beforehand; if not, it fills up in the middle of a file."""
    shared: bool = False
    """Whether the ranks write one file together, however small it is."""
    saving: sc.SavePolicy = field(default_factory=sc.SavePolicy)

    @contextmanager
    def there(self) -> Iterator[None]:
        with ExitStack() as stack:
            if not self.reserves:
                for module in (write, choose):
                    stack.enter_context(mock.patch.object(module, "allocate", return_value=None))
            if self.shared:
                stack.enter_context(mock.patch.multiple(share, LEAST=4096, _GRAIN=4096))
            yield


CASES = {
    "the next step": Case(),
    "the same step again": Case(step=1),
    "in the middle of a file": Case(reserves=False),
    "in the middle of a file that ranks share": Case(reserves=False, shared=True),
    "without a copy of the state": Case(saving=sc.SavePolicy(staging="none")),
    "no inodes": Case(of="inodes"),
}


@dataclass(frozen=True)
class Disk:
    """A mounted file system, and what takes the room on it."""

    place: Path

    def free(self, what: str) -> int:
        told = os.statvfs(self.place)
        return told.f_bfree * told.f_frsize // PAGE if what == "pages" else told.f_ffree

    def fill(self, what: str, left: int) -> None:
        """Leave so many pages, or so many files."""
        ballast = self.place / "ballast"
        ballast.mkdir()
        if what == "inodes":
            for number in range(self.free(what) - left):
                (ballast / str(number)).touch()
        elif (nbytes := (self.free(what) - left) * PAGE) > 0:
            with (ballast / "file").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        assert self.free(what) == left

    def make_room(self) -> None:
        shutil.rmtree(self.place / "ballast")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "small"
    place.mkdir()
    options = f"size={PAGES * PAGE},nr_inodes={INODES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True, timeout=20)
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=20)


def state_of(rank: int, version: int) -> dict[str, Any]:
    model = {"w": torch.full((20_000,), float(version), dtype=torch.float64)}
    return {"model": model, "own": {"w": torch.full((3_000,), float(10 * version + rank), dtype=torch.float64)}}


def version_of(checkpoints: sc.CheckpointManager, step: int, rank: int) -> int:
    """An error if it is not all of one piece."""
    state = state_of(rank, 0)
    checkpoints.load(step, state)
    version = int(state["model"]["w"][0])
    want = state_of(rank, version)
    assert all(torch.equal(state[part]["w"], want[part]["w"]) for part in want), state
    return version


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def is_told(act: Callable[[], object], step: int) -> bool:
    """Whether it fails, with an error that says what is wrong and what to do."""
    try:
        act()
    except sc.CheckpointError as raised:
        error = raised
    else:
        return False
    assert (type(error), error.step) == (sc.CheckpointSaveError, step)
    assert "the file system is full (or out of inodes): free space" in str(error)
    return True


def play(disk: Disk, case: Case, left: int) -> bool:
    """A job whose save of version 2 finds so much left; whether it was committed."""
    root, at_once = disk.place / "run", threading.Barrier(RANKS)

    def alone(act: Callable[[], object]) -> None:
        """One rank does it, after all have come here and before any goes on."""
        if at_once.wait(60) == 0:
            act()
        at_once.wait(60)

    def work(rank: int, checkpoints: sc.CheckpointManager) -> bool:
        def save(step: int, version: int) -> None:
            checkpoints.save(step, state_of(rank, version), replicated=("model",)).result(LIMIT)

        def look() -> dict[int, int]:
            return {step: version_of(checkpoints, step, rank) for step in checkpoints.steps()}

        save(1, 1)
        before = files_below(root)
        alone(lambda: disk.fill(case.of, left))
        committed = not is_told(lambda: save(case.step, 2), case.step)
        at_once.wait(60)
        assert committed or files_below(root) == before
        expected = {1: 1} | {case.step: 2} if committed else {1: 1}
        assert look() == expected
        alone(disk.make_room)
        for step, version in ((case.step, 3), (3, 4)):
            save(step, version)
            expected[step] = version
        assert look() == expected
        assert sorted(path.name for path in root.iterdir()) == [f"step_{step}" for step in sorted(expected)]
        at_once.wait(60)
        return committed

    def run(gangs: sc.Gangs) -> bool:
        try:
            with sc.CheckpointManager(root, gangs, timeout=LIMIT, saving=case.saving) as checkpoints:
                return work(gangs.root.rank, checkpoints)
        except BaseException:
            at_once.abort()
            raise

    try:
        first, second = run_ranks(RANKS, run)
    finally:
        for folder in (root, disk.place / "ballast"):
            shutil.rmtree(folder, ignore_errors=True)
    assert first == second
    return first


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(2)
def test_the_disk_is_full(disk: Disk, name: str, scale: Scale, scorecard: Scorecard) -> None:
    case, tried = CASES[name], dict[int, bool]()

    def try_it(left: int) -> bool:
        if left not in tried:
            with case.there():
                tried[left] = play(disk, case, left)
            scorecard.add("disk full", runs=1, notes=name)
        return tried[left]

    too_few, enough = -1, disk.free(case.of) // 2
    assert try_it(enough)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if try_it(middle) else (middle, enough)
    assert enough > RANKS + 1
    every = list(range(enough + 3))
    for left in random.Random(1).sample(every, min(len(every), scale.runs(sample=2, full=len(every)))):
        assert try_it(left) == (left >= enough), f"with {left} {case.of}; {enough} had been enough"
