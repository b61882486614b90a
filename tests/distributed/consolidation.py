"""What tests of the consolidated model file share: writing one on all ranks, and reading it with torch alone."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardckpt as sc
from shardckpt.engine.consolidated.write import write_consolidated
from shardckpt.engine.coordinates import Coordinates
from shardckpt.format.checksum import crc32
from shardckpt.format.index import decode_index
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage

PATIENT = timedelta(seconds=60)


def consolidate(
    storage: Storage | Path,
    gangs: sc.Gangs,
    model: nn.Module,
    *,
    timeout: timedelta = PATIENT,
    model_key: str = "model",
) -> FileEntry | None:
    """On all ranks: write `step_1/model.pt` in a conversation of its own."""
    place = LocalStorage(storage) if isinstance(storage, Path) else storage
    gang = gangs.fork("consolidate").root
    try:
        gang.enter("consolidate", timeout=timeout)
        at = Coordinates.of(gangs)
        return write_consolidated(
            place, gang, at, model=model, prefix="step_1", step=1, timeout=timeout, model_key=model_key
        )
    finally:
        gang.close()


@contextmanager
def gangs_here() -> Iterator[sc.Gangs]:
    """Of all ranks of the job; for placements of models the mesh counts, and not the gangs."""
    gangs = sc.Gangs.from_env()
    try:
        yield gangs
    finally:
        gangs.close()


@contextmanager
def without_collectives() -> Iterator[None]:
    """Nothing may be done on any group of the training meanwhile; gloo counts what is."""
    before = operations()
    yield
    assert operations() == before


def operations() -> dict[str, int]:
    """How many there have been on each process group, by its name."""
    groups = dist.distributed_c10d._world.pg_map if dist.is_initialized() else ()
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def consolidate_and_read(root: Path, model: nn.Module) -> dict[str, Any]:
    """On all ranks of the job: write the file of the model, check it as far as can be, give its state to all."""
    with gangs_here() as gangs, without_collectives():
        entry = consolidate(root, gangs, model)
    assert (entry is not None) == (dist.get_rank() == 0)
    state = read(root, entry)
    dist.barrier()
    return state


def read(root: Path, entry: FileEntry | None) -> dict[str, Any]:
    """The state in the file, which is an ordinary archive and the only file; the entry, if given, says what it is."""
    folder = root / "step_1"
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    assert zipfile.ZipFile(folder / "model.pt").testzip() is None
    if entry is not None:
        check_entry(folder, entry)
    content = torch.load(folder / "model.pt", mmap=True, weights_only=True)
    assert content.keys() == {"model", "model_key"}
    assert content["model_key"] == "model"
    return content["model"]


def check_entry(folder: Path, entry: FileEntry) -> None:
    content = (folder / entry.name).read_bytes()
    assert (entry.kind, entry.writer, entry.nbytes, entry.crc) == ("consolidated", 0, len(content), crc32(content))
    assert entry.index is not None
    assert entry.tree is not None
    for at, nbytes, crc in (entry.index, entry.tree):
        assert crc32(content[at : at + nbytes]) == crc
    at, nbytes, _ = entry.index
    for record in decode_index(content[at : at + nbytes], len(content)).records:
        assert crc32(content[record.at : record.at + record.nbytes]) == record.crc


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names, plain tensors, and every bit of them."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        if not isinstance(tensor, torch.Tensor):
            assert found[name] == tensor, name
            continue
        assert type(found[name]) is torch.Tensor, name
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw), name
