"""Read exactly the bytes that this rank needs, check them, and only then copy them to the state.

Nothing is copied before all ranks have checked all their bytes: a damaged checkpoint changes nothing. (2026-11: DESIGN
had the reads go straight to the destinations; a load that fails half way would then leave a model that is half old
and half new, for the user to train on.) Until then the bytes are kept in memory of our own (`arena`), as from an object
store, or stay where they lie (`borrow`), as on a file system of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shardckpt.engine.loading.fit import WantedTensor
from shardckpt.engine.loading.integrity import PartialSum, Region, Runs, sum_among_zeros
from shardckpt.engine.loading.sources import Chunk
from shardckpt.format.checksum import combine
from shardckpt.format.index import StoredBox, StoredRecord
from shardckpt.format.manifest import TensorEntry
from shardckpt.format.placement import Box
from shardckpt.storage.base import Read

WASTE = 512 << 10
"""Bytes that a rank may read in excess, over all its tensors, to get many short runs of a record in one read."""

NO_SUM = -1
"""The CRC of a record of which nobody has noted one: it is not checked."""

KeyOf: TypeAlias = Callable[[str], str]
"""From the name of a file in the record to its key in the storage."""

Summed: TypeAlias = tuple[int, int, int]
"""A piece of a record: its offset in the record, its bytes, their CRC."""


class Need(NamedTuple):
    """A box inside a record of a file, and where it goes in the local tensor (`target`, in elements)."""

    file: str
    stored: StoredBox
    region: Region
    target: tuple[int, ...]
    wanted: int
    """Position of the wanted tensor in its list."""


@dataclass(slots=True, eq=False)
class Fetched:
    """One region that is fetched. In an arena: at `offset`, as its runs one after the other or as the whole span."""

    need: Need
    record: StoredRecord
    runs: Runs
    offset: int = 0
    spans: bool = False

    @property
    def nbytes(self) -> int:
        return self.runs.span if self.spans else self.runs.total

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its record."""
        return self.runs.total == self.record.nbytes


class Fetch(Protocol):
    """All regions that this rank reads. Used for one load: first `add`, then `read`, then `fill`; `release` always."""

    def add(self, need: Need, record: StoredRecord) -> Fetched:
        """Have a region fetched."""
        ...

    def read(self, others: Sequence[Read]) -> tuple[list[str], list[PartialSum]]:
        """Read and check everything, and fill the `others`; no tensor of the state changes.

        Gives the files with a damaged record, and the sums of the records that were read in part.
        """
        ...

    def fill(self, places: Sequence[tuple[Fetched, torch.Tensor]], *, timeout: timedelta | None) -> None:
        """Copy each region to its place, a tensor of the region's shape on any device and of any dtype.

        `CheckpointLoadError` if that breaks off, in which case some places are filled and some are not.
        """
        ...

    def release(self) -> None:
        """Give back what was read."""
        ...


def judge(items: Iterable[tuple[Fetched, Iterable[Summed]]]) -> tuple[list[str], list[PartialSum]]:
    """(files with a damaged record, sums of the records that were read in part), from the pieces of each region."""
    damaged, partial = set(), []
    for item, summed in items:
        record, need = item.record, item.need
        if record.crc == NO_SUM:
            continue
        if item.is_whole:
            pieces = list(summed)
            crc = pieces[0][2] if len(pieces) == 1 else combine((crc, nbytes) for _, nbytes, crc in pieces)[0]
            if crc != record.crc:
                damaged.add(need.file)
            continue
        total = sum_among_zeros(record.nbytes, summed)
        what = (need.file, need.stored.record, need.stored.name, record.shape, need.region)
        partial.append(PartialSum(*what, item.runs.total, record.nbytes, record.crc, total))
    return sorted(damaged), partial


def overlaps(wanted: WantedTensor, chunks: list[Chunk]) -> list[tuple[Chunk, Region, tuple[int, ...]]]:
    """Which part of which chunk fills which part of the wanted tensor: (chunk, region of its box, target offsets).

    The intersections are DCP's (`create_read_items_for_chunk_list`). `ValueError` if they do not cover the tensor.
    """
    if len(chunks) == len(wanted.boxes) == 1:  # as in most loads, and for 20,000 tensors the rest takes half a second
        chunk, (own,) = chunks[0], wanted.boxes
        if (chunk[1].offsets, chunk[1].lengths) == (own.offsets, own.lengths):
            return [(chunk, Region(chunk[1].local, own.lengths), own.local)]
    local = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.lengths)) for b in wanted.boxes]
    saved = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.lengths)) for _, b in chunks]
    size = torch.Size(wanted.shape)
    metadata = TensorStorageMetadata(TensorProperties(dtype=getattr(torch, wanted.dtype)), size, saved)
    found, covered = [], 0
    for item in create_read_items_for_chunk_list(wanted.name, metadata, local):
        assert item.dest_index.index is not None
        assert item.storage_index.index is not None
        chunk, box = chunks[item.storage_index.index], wanted.boxes[item.dest_index.index]
        start = tuple(a + b for a, b in zip(item.storage_offsets, chunk[1].local, strict=True))
        target = tuple(a + b for a, b in zip(item.dest_offsets, box.local, strict=True))
        found.append((chunk, Region(start, tuple(item.lengths)), target))
        covered += item.lengths.numel()
    needed = sum(math.prod(box.lengths) for box in wanted.boxes)
    if covered != needed:
        raise ValueError(f"{wanted.name}: the record's files hold {covered} of the {needed} elements that are needed")
    return found


def find_stored(by_name: Mapping[str, list[StoredBox]], name: str, box: Box, file: str) -> StoredBox:
    """The entry of a file's own index for a box that the record says it holds; `ValueError` if they disagree."""
    for stored in by_name.get(name, ()):
        if (stored.box.offsets, stored.box.lengths) == (box.offsets, box.lengths):
            return stored
    raise ValueError(f"{file} does not hold the part of {name} that the record says it holds")


def check_region(record: StoredRecord, region: Region, entry: TensorEntry | None, *, file: str, name: str) -> None:
    """`ValueError` if a file's own index has another dtype than the commit record, or the region is not in there."""
    inside = len(region.start) == len(record.shape) and (
        (region.lengths == record.shape and not any(region.start))  # most are, and this is the shorter way
        or all(start + n <= size for start, n, size in zip(region.start, region.lengths, record.shape, strict=True))
    )
    if entry is None or record.dtype != entry.dtype or not inside:
        raise ValueError(f"{file} and the record do not say the same of {name}")
