"""Data-parallel ranks hold the same state: they write it together, each a part, and what comes out is one file."""

from __future__ import annotations

import threading
import uuid
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shardckpt as sc
from shardckpt.engine.saving.share import LEAST, LEAST_OF_UPLOAD, share_out
from shardckpt.storage import open_storage
from shardckpt.storage.base import Buffer, PutPart, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.faults import FailingStorage, on
from shardckpt.testing.gangs import run_ranks


class Weighing(StorageWrapper):
    """Counts the bytes that this rank puts, by file."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.put_nbytes: dict[str, int] = {}

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return self._weigh(key, super().put(key, parts))

    def put_parts(self, key: str, *what: Any, **options: Any) -> tuple[PutPart, ...]:
        put: tuple[PutPart, ...] = self.inner.put_parts(key, *what, **options)  # type: ignore[attr-defined]
        self._weigh(key, sum(part.nbytes for part in put))
        return put

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


def save_alike(gangs: sc.Gangs, storage: Storage, *, steps: int = 2, staging: Any = "overlap") -> dict[str, int]:
    weighing = Weighing(storage)
    with sc.CheckpointManager(weighing, gangs, saving=sc.SavePolicy(staging=staging)) as checkpoints:
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


@pytest.mark.parametrize(("size", "staging"), [(2, "overlap"), (3, "overlap"), (3, "none")])
def test_small_tensors_across_the_ends_of_shares(tmp_path: Path, size: int, staging: Any) -> None:
    """Tensors that are copied together, so many of them that one lies on both sides of every end."""

    def save(gangs: sc.Gangs) -> None:
        state = {"model": {f"p{n}": torch.full((15_000,), float(n)) for n in range(220)}}
        with sc.CheckpointManager(tmp_path, gangs, saving=sc.SavePolicy(staging=staging)) as checkpoints:
            checkpoints.save(1, state, replicated="*").result()

    run_ranks(size, save)
    with zipfile.ZipFile(tmp_path / "step_1/model.pt") as archive:
        assert archive.testzip() is None
    content = torch.load(tmp_path / "step_1/model.pt", mmap=True, weights_only=True)["model"]
    assert all(torch.equal(content[f"p{n}"], torch.full((15_000,), float(n))) for n in range(220))


@pytest.mark.parametrize(("size", "staging"), [(2, "overlap"), (3, "none")])
def test_ranks_put_one_object_together(size: int, staging: str) -> None:
    storage = MemoryObjects()
    written = run_ranks(size, lambda gangs: save_alike(gangs, storage, staging=staging))
    (attempt,) = [name for name in storage.list("step_2") if name != "manifest.json"]
    for name, sharers in (("model.pt", 2), ("replicated.pt", size)):
        content, shares = storage.read(f"step_2/{attempt}{name}"), [rank.get(name, 0) for rank in written]
        assert sum(shares) == len(content)
        assert sum(share > 0 for share in shares) == sharers
        assert max(shares) < len(content) / sharers + (2 << 20)
        with zipfile.ZipFile(BytesIO(content)) as archive:
            assert archive.testzip() is None
    assert storage.list_uploads() == []


def test_where_objects_cannot_be_shared_different_ranks_put_different_ones() -> None:
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    written = run_ranks(2, lambda gangs: save_alike(gangs, storage))
    assert set(written[0]) - {"manifest.json"} == {"model.pt"}
    assert set(written[1]) == {"replicated.pt"}
    storage.delete_tree("step_1")
    storage.delete_tree("step_2")


@pytest.mark.parametrize("name", ["begin_upload", "put_parts", "finish_upload"])
def test_a_failure_among_several_writers_of_an_object_leaves_nothing(name: str) -> None:
    """On one rank alone; the next save is good."""
    storage = MemoryObjects()

    def save(gangs: sc.Gangs) -> None:
        failing = FailingStorage(storage, on(name), error=lambda: PermissionError("injected"))
        harmed = gangs.root.rank == (0 if name == "finish_upload" else 1)
        with sc.CheckpointManager(failing if harmed else storage, gangs) as manager:
            with pytest.raises(sc.CheckpointSaveError, match="injected"):
                manager.save(1, state_of(1), replicated="*").result()
            manager.save(2, state_of(2), replicated="*").result()
            assert manager.steps() == [2]

    run_ranks(2, save)
    assert storage.list() == ["step_2/"]
    assert storage.list_uploads() == []


@given(
    nbytes=st.integers(0, 200 << 20), sharers=st.integers(1, 40), least=st.sampled_from([None, LEAST, LEAST_OF_UPLOAD])
)
def test_shares_make_up_the_whole(nbytes: int, sharers: int, least: int | None) -> None:
    for home in ("model", "replicated"):
        shares = [
            share_out(nbytes, home=home, sharers=sharers, place=place, least=least)  # type: ignore[arg-type]
            for place in range(sharers)
        ]
        working = sorted((share for share in shares if not share.is_empty), key=lambda share: share.start)
        assert [share.start for share in working] == [0, *(share.end for share in working[:-1])]
        assert working[-1].end == nbytes
        assert [share.tail for share in working] == [False] * (len(working) - 1) + [True]
        assert all(share.start % 4096 == 0 for share in working)
        assert all(share.whole == (len(working) == 1) for share in working)
        assert len(working) == 1 or (least is not None and nbytes // len(working) >= least)
    if sharers > 1:
        owners = [
            share_out(0, home=home, sharers=sharers, place=0, least=least).tail  # type: ignore[arg-type]
            for home in ("model", "replicated")
        ]
        assert owners == [True, False]
