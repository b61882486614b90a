"""Two hundred saves in a row leave nothing behind: memory, threads, descriptors and /dev/shm as after the third.

Page-locked memory is none here; `tests/engine/devices/test_order.py` counts it where devices are simulated.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch

import shardckpt as sc

SAVES = 200
SETTLED = 3
GROWTH = 8 << 20
"""Bytes that the process may have grown by since: pages of Python's and of malloc's own. It was 1.1 MB, and
5 MB in a process that had run a third of the suite before (2026-11)."""


@dataclass(frozen=True)
class Held:
    threads: tuple[str, ...]
    files: int
    shared: tuple[str, ...]
    locked: tuple[int, ...]
    """Page-locked bytes of each stager."""
    nbytes: int


def held(checkpoints: sc.CheckpointManager) -> Held:
    gc.collect()
    threads = tuple(sorted(thread.name for thread in threading.enumerate()))
    mine = tuple(name for name in os.listdir("/dev/shm") if str(os.getpid()) in name)
    nbytes = psutil.Process().memory_info().rss
    locked = tuple(stager.locked_nbytes for stager in checkpoints._saver._flights._stagers)
    return Held(threads, opened(), mine, locked, nbytes)


def opened() -> int:
    """Descriptors of this process, less those that other threads of it only open for a moment."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.005)
    return min(counts)


def test_two_hundred_saves(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": sc.RngState(), "values": {"losses": [0.5]}}
    saving, levels = sc.SavePolicy(verify_copies=True), list[Held]()
    with sc.CheckpointManager(tmp_path, keep=sc.KeepLast(2), saving=saving) as checkpoints:
        for step in range(1, SAVES + 1):
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            checkpoints.save(step, state).result(timedelta(seconds=30))
            checkpoints._saver._thread.join()  # and what comes after the commit
            if step in (SETTLED, SAVES) or step % 20 == 0:
                levels.append(held(checkpoints))
        assert checkpoints.steps() == [SAVES - 1, SAVES]
    first = levels[0]
    for level in levels[1:]:
        assert replace(level, files=first.files, nbytes=first.nbytes) == first
        assert level.files <= first.files, "what earlier tests had left open may be closed"
    assert first.locked == (0,), "without a device there is nothing to lock memory for"
    assert first.threads.count("shardckpt-save") == first.threads.count("shardckpt-copy") == 1
    assert levels[-1].nbytes - first.nbytes < GROWTH
