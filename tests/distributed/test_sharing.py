"""Data-parallel ranks hold the same state: they write it together, each a part, and what comes out is one file."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shardckpt as sc
from shardckpt.engine.saving.share import LEAST, share_out
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.gangs import run_ranks


class Weighing(StorageWrapper):
    """Counts the bytes that this rank puts, by file."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.put_nbytes: dict[str, int] = {}

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return self._weigh(key, super().put(key, parts))

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        return self._weigh(key, self.inner.put_range(key, offset, parts))  # type: ignore[attr-defined, no-any-return]

    def _weigh(self, key: str, nbytes: int) -> int:
        name = key.rpartition("/")[2]
        self.put_nbytes[name] = self.put_nbytes.get(name, 0) + nbytes
        return nbytes


class Wide(nn.Module):
    """16 MiB in parameters of very different sizes, one of them larger than a rank's share."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(3 << 20))
        self.odd = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in (1, 5000, 70_001, 300_000, 17, 700_000, 3))
        self.turned = nn.Parameter(torch.randn(300, 500).t())
        self.register_buffer("count", torch.tensor(7))


SEEDING = threading.Lock()
"""Ranks are threads here, and torch's generator is all of theirs."""


def state_of(seed: int) -> dict[str, Any]:
    with SEEDING:
        torch.manual_seed(seed)
        model = Wide()
        optimizer = torch.optim.AdamW(model.parameters())
        model.large.grad = torch.randn_like(model.large)
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "epoch": 3}


def save_alike(gangs: sc.Gangs, storage: Storage, *, steps: int = 2) -> dict[str, int]:
    weighing = Weighing(storage)
    with sc.CheckpointManager(weighing, gangs) as checkpoints:
        for step in range(1, steps + 1):
            weighing.put_nbytes.clear()
            checkpoints.save(step, state_of(step), replicated="*").result()
        after = state_of(9)
        checkpoints.load(steps, after)
    expected = state_of(steps)
    for name, value in expected["model"].state_dict().items():
        assert torch.equal(after["model"].state_dict()[name], value), name
    return weighing.put_nbytes


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_one_file_together(tmp_path: Path, size: int) -> None:
    written = run_ranks(size, lambda gangs: save_alike(gangs, LocalStorage(tmp_path)))
    folder = tmp_path / "step_2"
    for name in ("model.pt", "replicated.pt"):
        total, shares = (folder / name).stat().st_size, [rank.get(name, 0) for rank in written]
        assert sum(shares) == total
        assert max(shares) < total / size + (2 << 20)
        with zipfile.ZipFile(folder / name) as archive:
            assert archive.testzip() is None
    content = torch.load(folder / "model.pt", mmap=True, weights_only=True)
    assert list(content) == ["model", "model_key"]
    for name, value in state_of(2)["model"].state_dict().items():
        assert torch.equal(content["model"][name], value), name
    assert sorted(torch.load(folder / "replicated.pt", weights_only=True)) == ["epoch", "optimizer"]
    assert not list(folder.glob("rank_*"))


def test_an_object_is_put_by_one_rank_and_different_ones_by_different_ranks() -> None:
    storage = MemoryObjects()
    written = run_ranks(2, lambda gangs: save_alike(gangs, storage))
    assert set(written[0]) - {"manifest.json"} == {"model.pt"}
    assert set(written[1]) == {"replicated.pt"}


@given(nbytes=st.integers(0, 200 << 20), sharers=st.integers(1, 40), in_ranges=st.booleans())
def test_shares_make_up_the_whole(nbytes: int, sharers: int, in_ranges: bool) -> None:
    for home in ("model", "replicated"):
        shares = [
            share_out(nbytes, home=home, sharers=sharers, place=place, in_ranges=in_ranges)  # type: ignore[arg-type]
            for place in range(sharers)
        ]
        working = sorted((share for share in shares if not share.is_empty), key=lambda share: share.start)
        assert [share.start for share in working] == [0, *(share.end for share in working[:-1])]
        assert working[-1].end == nbytes
        assert [share.tail for share in working] == [False] * (len(working) - 1) + [True]
        assert all(share.start % 4096 == 0 for share in working)
        assert all(share.whole == (len(working) == 1) for share in working)
        assert len(working) == 1 or (in_ranges and nbytes // len(working) >= LEAST)
    if sharers > 1:
        owners = [
            share_out(0, home=home, sharers=sharers, place=0, in_ranges=in_ranges).tail  # type: ignore[arg-type]
            for home in ("model", "replicated")
        ]
        assert owners == [True, False]
