"""Read exactly the bytes that this rank needs, check them, and lend them as tensors.

Everything is read into memory of our own first. Only when all ranks have all their bytes, checked, are they copied
to the state: a damaged checkpoint changes nothing. (2026-11: DESIGN had the reads go straight to the destinations;
a load that fails half way would then leave a model that is half old and half new, for the user to train on.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shardckpt.engine.loading.fit import WantedTensor
from shardckpt.engine.loading.integrity import PartialSum, Region, Runs, linear_sum, runs_of
from shardckpt.engine.loading.sources import Chunk
from shardckpt.engine.saving.image import Image
from shardckpt.format.archive import LINE
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox, StoredRecord
from shardckpt.format.placement import Box
from shardckpt.storage.base import Read

WASTE = 512 << 10
"""Bytes that a rank may read in excess, over all its tensors, to get many short runs of a record in one read."""


@dataclass(frozen=True, slots=True)
class Need:
    """A box inside a record of a file, and where it goes in the local tensor (`target`, in elements)."""

    file: str
    stored: StoredBox
    region: Region
    target: tuple[int, ...]
    wanted: int
    """Position of the wanted tensor in its list."""


@dataclass(slots=True)
class Fetched:
    """One region in memory: at `offset` of the arena, as its runs one after the other or as the whole span."""

    need: Need
    record: StoredRecord
    runs: Runs
    offset: int = 0
    spans: bool = False

    @property
    def nbytes(self) -> int:
        return self.runs.span if self.spans else self.runs.total


@dataclass(slots=True)
class Arena:
    """All regions that this rank reads, laid out in one buffer."""

    fetched: list[Fetched] = field(default_factory=list)
    image: Image = field(default_factory=Image)
    nbytes: int = 0
    _waste: int = WASTE

    def add(self, need: Need, record: StoredRecord) -> Fetched:
        """Have room for a region."""
        item = Fetched(need, record, runs_of(record, need.region), self.nbytes)
        excess = item.runs.span - item.runs.total
        if excess and excess <= self._waste:
            self._waste -= excess
            item.spans = True
        self.fetched.append(item)
        self.nbytes = -(-(self.nbytes + item.nbytes) // LINE) * LINE
        return item

    def reads(self, prefix: str) -> Iterable[Read]:
        """The reads that fill the buffer."""
        self.image.reserve(max(self.nbytes, 1))
        view = self.image.view
        for item in self.fetched:
            key, at = f"{prefix}/{item.need.file}", item.record.at
            if item.spans:
                yield Read(key, at + item.runs.offsets[0], view[item.offset : item.offset + item.nbytes])
                continue
            position, size = item.offset, item.runs.nbytes
            for offset in item.runs.offsets:
                yield Read(key, at + offset, view[position : position + size])
                position += size

    def check(self) -> tuple[list[str], list[PartialSum]]:
        """(files with a damaged record, sums of the records that were read in part)."""
        damaged, partial = set(), []
        for item in self.fetched:
            pieces = list(self._pieces(item))
            if item.runs.total == item.record.nbytes:
                if crc32(pieces[0]) != item.record.crc:
                    damaged.add(item.need.file)
            else:
                partial.append(self._partial_sum(item, pieces))
        return sorted(damaged), partial

    def tensor(self, item: Fetched) -> torch.Tensor:
        """The region's elements, in the shape of its box; a view of the buffer."""
        dtype = getattr(torch, item.record.dtype)
        shape = item.need.region.lengths
        if not item.spans:
            return self.image.tensor(item.offset, dtype, shape)
        strides = torch.empty(item.record.shape, device="meta").stride()
        flat = self.image.tensor(item.offset, dtype, (item.nbytes // dtype.itemsize,))
        return flat.as_strided(shape, strides)

    def _pieces(self, item: Fetched) -> Iterable[memoryview]:
        view, size, first = self.image.view, item.runs.nbytes, item.runs.offsets[0]
        for number, offset in enumerate(item.runs.offsets):
            at = item.offset + (offset - first if item.spans else number * size)
            yield view[at : at + size]

    def _partial_sum(self, item: Fetched, pieces: list[memoryview]) -> PartialSum:
        record, need = item.record, item.need
        total = linear_sum(record.nbytes, item.runs, pieces)
        what = (need.file, need.stored.record, need.stored.name, record.shape, need.region)
        return PartialSum(*what, item.runs.total, record.nbytes, record.crc, total)


def overlaps(wanted: WantedTensor, chunks: list[Chunk]) -> list[tuple[Chunk, Region, tuple[int, ...]]]:
    """Which part of which chunk fills which part of the wanted tensor: (chunk, region of its box, target offsets).

    The intersections are DCP's (`create_read_items_for_chunk_list`). `ValueError` if they do not cover the tensor.
    """
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
