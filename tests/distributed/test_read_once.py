"""What several ranks need of an object store is fetched once and passed on, and what happens if that goes wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.engine.loading.once.groups import BLOCK, LEAST, Group, blocks, by_key, digests, find_groups
from shardckpt.gang.relay import Relay
from shardckpt.storage.base import Read
from shardckpt.storage.filesystem import FsspecStorage
from shardckpt.storage.memory import MemoryObjects
from shardckpt.testing.faults import CountingStorage, FailingStorage, on
from shardckpt.testing.gangs import run_ranks, run_ranks_settled
from shardckpt.testing.pool import ProcessPool

MiB = 1 << 20


def state_of(seed: int) -> dict[str, Any]:
    """20 MiB in one large tensor and 300 small ones."""
    drawn = torch.Generator().manual_seed(seed)
    model = nn.ParameterDict({f"small_{i}": torch.randn(1000, generator=drawn) for i in range(300)})
    model["large"] = nn.Parameter(torch.randn(5 * MiB, generator=drawn))
    return {"model": model, "epoch": seed}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(one["model"].parameters(), other["model"].parameters(), strict=True)
    return one["epoch"] == other["epoch"] and all(torch.equal(a, b) for a, b in pairs)


def saved(ranks: int) -> MemoryObjects:
    storage = MemoryObjects()

    def save(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.save(1, state_of(1), replicated="*").result()

    run_ranks(ranks, save)
    return storage


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_need_the_same_fetch_it_once(size: int) -> None:
    storage = saved(2)

    def load(gangs: sc.Gangs) -> dict[str, int]:
        counting, state = CountingStorage(storage), state_of(2)
        with sc.CheckpointManager(counting, gangs) as manager:
            manager.load(1, state)
        assert same(state, state_of(1))
        return {key.rpartition("/")[2]: nbytes for key, nbytes in counting.nbytes.items()}

    fetched = [own["model.pt"] for own in run_ranks(size, load)]
    (attempt,) = [name for name in storage.list("step_1") if name != "manifest.json"]
    nbytes = storage.size(f"step_1/{attempt}model.pt")
    assert sum(fetched) < 1.05 * nbytes + size * 64 * 1024  # each looks at the index by itself
    assert max(fetched) < nbytes / size + BLOCK + 64 * 1024


def test_a_rank_that_cannot_fetch_its_share_is_named_on_all_and_nothing_changes() -> None:
    storage = saved(1)

    def load(gangs: sc.Gangs) -> None:
        place = FailingStorage(storage, on("read_into", key="model.pt"), nth=2, error=lambda: PermissionError("no"))
        state = state_of(2)
        with sc.CheckpointManager(place if gangs.root.rank == 1 else storage, gangs) as manager:
            with pytest.raises(sc.CheckpointLoadError, match=r"rank 1.*no"):
                manager.load(1, state)
            assert same(state, state_of(2))
            manager.load(1, state)
            assert same(state, state_of(1))

    run_ranks(2, load)


def test_damage_that_one_rank_has_fetched_is_seen_by_all() -> None:
    storage = saved(1)
    (attempt,) = [name for name in storage.list("step_1") if name != "manifest.json"]
    key = f"step_1/{attempt}model.pt"
    content = bytearray(storage.read(key))
    content[len(content) // 2] ^= 1
    storage.replace(key, bytes(content))

    def load(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.load(1, state_of(2))

    for outcome in run_ranks_settled(2, load):
        assert isinstance(outcome, sc.CheckpointDamagedError)


def load_and_die(rank: int, world_size: int, folder: Path, root: str) -> int:
    """Rank 1 is killed when it is to pass on; gives how much this rank has fetched."""
    from fsspec.implementations.local import LocalFileSystem

    storage, state = CountingStorage(FsspecStorage(LocalFileSystem(), root)), state_of(2)
    gangs = sc.Gangs.from_env()
    with sc.CheckpointManager(storage, gangs, timeout=timedelta(seconds=30)) as manager:
        manager.load(1, state)
        assert same(state, state_of(1))
        fetched = storage.total_nbytes
    with sc.CheckpointManager(storage, gangs, timeout=timedelta(seconds=5)) as manager:  # the other waits for so long
        if rank:
            Relay.pass_on = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(sc.CheckpointLoadError, match="rank"):
            manager.load(1, state)
    return fetched


@pytest.mark.crash
def test_processes_pass_on_over_gloo_and_notice_a_death(ranks: ProcessPool, tmp_path: Path) -> None:
    """fsspec's local file system stands for an object store that several processes see."""
    from fsspec.implementations.local import LocalFileSystem

    with sc.CheckpointManager(FsspecStorage(LocalFileSystem(), str(tmp_path))) as manager:
        manager.save(1, state_of(1)).result()
    alive, dead = ranks.run_settled(2, load_and_die, str(tmp_path), timeout=60)
    assert "killed by signal 9" in str(dead.error)
    assert alive.error is None, alive.error
    assert alive.value < 0.7 * sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))


def reads(*extents: tuple[str, int, int]) -> Sequence[Read]:
    return [Read(key, offset, memoryview(bytearray(nbytes))) for key, offset, nbytes in extents]


def test_groups_are_of_those_that_read_exactly_the_same() -> None:
    alike = digests(by_key(reads(("a", 64, MiB), ("a", 0, 64), ("b", 0, LEAST), ("c", 0, LEAST - 1))))
    again = digests(by_key(reads(("b", 0, LEAST), ("a", 0, 64), ("a", 64, MiB))))
    other = digests(by_key(reads(("a", 0, MiB + 64), ("b", 0, LEAST))))
    assert set(alike) == {"a", "b"}  # what is small is not worth while
    assert find_groups([alike, other, again, {}]) == [Group((0, 1, 2), ("b",)), Group((0, 2), ("a",))]
    assert find_groups([alike]) == []


def test_blocks_cover_everything_in_pieces_of_about_one_size() -> None:
    given = reads(("a", 10, 5), ("a", 100, 2 * BLOCK), ("a", 3 * BLOCK, 7))
    found = blocks(given)
    assert [sum(len(read.into) for read in block) for block in found] == [BLOCK, BLOCK, 12]
    extents = [(read.offset, read.offset + len(read.into)) for block in found for read in block]
    assert extents == [
        (10, 15),
        (100, 95 + BLOCK),
        (95 + BLOCK, 95 + 2 * BLOCK),
        (95 + 2 * BLOCK, 100 + 2 * BLOCK),
        (3 * BLOCK, 3 * BLOCK + 7),
    ]
    for number, block in enumerate(found):
        for read in block:
            read.into[:] = bytes([number + 1]) * len(read.into)
    assert all(0 not in set(read.into[:: max(1, len(read.into) // 1000)]) for read in given)
