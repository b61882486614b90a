"""The power fails, for a real file system on a loop device, at a random moment of saves: what was promised is there.

`FS_IOC_SHUTDOWN` without a flush of the journal drops what has not reached the device, as a power cut does to memory.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.root, pytest.mark.crash, pytest.mark.slow, pytest.mark.timeout(7200)]

_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs.h; the number is the same for ext4 and xfs
LIMIT = timedelta(seconds=30)
MAKING = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
NBYTES = {"ext4": 64 << 20, "xfs": 320 << 20}
"""Of the image; xfs takes none that is much smaller."""


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        run("umount", str(place))
        await_release(image)


def await_release(image: Path) -> None:
    """Until nothing holds the file system any more: a process that got a namespace of its own meanwhile (another test's
    `ip netns exec`) has a copy of the mount, and who mounts again then gets the one that has lost its power."""
    deadline = time.monotonic() + 60
    while subprocess.run(["losetup", "-j", str(image)], capture_output=True, check=True, timeout=60).stdout:
        assert time.monotonic() < deadline, f"something still holds {image}"
        time.sleep(0.02)


def cut_the_power(place: Path) -> None:
    folder = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(folder)


def state_of(step: int, life: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((20_000,), float(1000 * step + life))}, "life": life}


def found(root: Path) -> dict[int, int]:
    """By step that is offered, of which life it is; an error if it is not all of one piece."""
    lives = {}
    with sc.CheckpointManager(root, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in checkpoints.steps():
            state = checkpoints.load_checkpoint(step)
            lives[step] = state["life"]
            assert torch.equal(state["model"]["w"], state_of(step, state["life"])["model"]["w"])
    return lives


def save_until_the_cut(place: Path, life: int, first: int, delay_s: float) -> dict[int, int]:
    """What was promised before the power failed.

    Not what was promised since: a real cut ends the program as well, and a folder's fsync on an xfs that is being shut
    down may find nothing left to write, and succeed.
    """
    promised, failing = dict[int, int](), threading.Event()

    def fail() -> None:
        failing.set()
        cut_the_power(place)

    cut = threading.Timer(delay_s, fail)
    checkpoints = sc.CheckpointManager(place / "run", sc.Gangs.local(), keep=sc.KeepLast(3), timeout=LIMIT, tolerate=0)
    cut.start()
    try:
        for step in range(first, first + 200):
            checkpoints.save(step, state_of(step, life)).result(LIMIT)
            if failing.is_set():
                break
            promised[step] = life
    except sc.CheckpointError:
        pass
    finally:
        cut.join()
        checkpoints.close()
    return promised


def power_cuts(image: Path, place: Path, rounds: int, chance: random.Random, count: Callable[[], None]) -> None:
    first, promised = 1, dict[int, int]()
    for life in range(1, rounds + 1):
        with mounted(image, place):
            promised |= save_until_the_cut(place, life, first, chance.uniform(0.02, 0.3))
        with mounted(image, place):
            lives = found(place / "run")
            newest = max(promised, default=0)
            assert max(lives, default=0) >= newest, f"step {newest} was promised, and there are {lives}"
            for step, life_there in lives.items():
                assert life_there >= promised.get(step, 0)
            first = max(lives, default=1)  # and save that one again
            for left in (place / "run").glob("*.tmp"):
                shutil.rmtree(left)
        count()


@pytest.fixture(params=MAKING)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with an empty file system."""
    command = MAKING[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    made, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with made.open("wb") as file:
        file.truncate(NBYTES[request.param])
    try:
        run(*command, str(made))
        with mounted(made, place):
            cut_the_power(place)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"{request.param} cannot be mounted or shut down here: {error}")
    return made


def test_the_power_fails(image: Path, tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    rounds = scale.runs(sample=2, full=300)
    count = lambda: scorecard.add("real power cuts", runs=1)  # noqa: E731
    power_cuts(image, tmp_path / "place", rounds, random.Random(7), count)


def test_folders_that_are_not_synced_are_found(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    with pytest.raises((AssertionError, sc.CheckpointError)):
        power_cuts(image, tmp_path / "place", 20, random.Random(7), lambda: None)
