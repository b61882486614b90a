"""Read exactly the bytes that this rank needs, check them, and only then copy them to the state.

Nothing is copied before all ranks have checked all their bytes: a damaged checkpoint changes nothing. (2026-11: DESIGN
had the reads go straight to the destinations; a load that fails half way would then leave a model that is half old
and half new, for the user to train on.) Until then the bytes are kept in memory of our own (`Arena`), as from an
object store, or stay where they lie (`Borrowed`, in `borrow`), as on a file system of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shardckpt.engine.loading.fetching.meter import UNWATCHED, Meter, read_metered
from shardckpt.engine.loading.fit import WantedTensor
from shardckpt.engine.loading.integrity import PartialSum, Region, Runs, runs_of, sum_among_zeros
from shardckpt.engine.loading.sources import Chunk
from shardckpt.engine.saving.image import Image
from shardckpt.format.archive import LINE
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import StoredBox, StoredRecord
from shardckpt.format.manifest import TensorEntry
from shardckpt.format.placement import Box
from shardckpt.storage.base import Read, Storage

WASTE = 512 << 10
"""Bytes that a rank may read in excess, over all its tensors, to get many short runs of a record in one read."""

NO_SUM = -1
"""The CRC of a record of which nobody has noted one: it is not checked."""

KeyOf: TypeAlias = Callable[[str], str]
"""From the name of a file in the record to its key in the storage."""

Summed: TypeAlias = tuple[int, int, int]
"""A piece of a record: its offset in the record, its bytes, their CRC."""


@dataclass(frozen=True, slots=True)
class Need:
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


class Arena:
    """All regions laid out in one buffer, which they are read into once: what is fetched from afar is kept."""

    def __init__(self, storage: Storage, key_of: KeyOf, meter: Meter = UNWATCHED) -> None:
        self._storage = storage
        self._key_of = key_of
        self._meter = meter
        self._fetched: list[Fetched] = []
        self._image = Image()
        self._nbytes = 0
        self._waste = WASTE
        self._here: frozenset[str] = frozenset()

    def add(self, need: Need, record: StoredRecord) -> Fetched:
        item = Fetched(need, record, runs_of(record, need.region), self._nbytes)
        excess = item.runs.span - item.runs.total
        if excess and excess <= self._waste:
            self._waste -= excess
            item.spans = True
        self._fetched.append(item)
        self._nbytes = -(-(self._nbytes + item.nbytes) // LINE) * LINE
        return item

    def reads(self) -> list[Read]:
        """All that is to be fetched; whoever does it says so by `have`."""
        return list(self._reads())

    def have(self, keys: Collection[str]) -> None:
        """What is needed of these objects has come by other means."""
        self._here = frozenset(keys)

    def read(self, others: Sequence[Read]) -> tuple[list[str], list[PartialSum]]:
        wanted = [read for read in self._reads() if read.key not in self._here]
        wanted += others
        self._meter.begin("reading", (len(read.into) for read in wanted))
        read_metered(self._storage, wanted, self._meter)
        return judge((item, self._summed(item)) for item in self._fetched)

    def fill(self, places: Sequence[tuple[Fetched, torch.Tensor]], *, timeout: timedelta | None) -> None:
        """In the caller's thread: everything is in memory, so nothing can take long."""
        with torch.no_grad():
            for item, place in places:
                place.copy_(self._tensor(item))

    def release(self) -> None:
        self._image.release()

    def _reads(self) -> Iterable[Read]:
        self._image.reserve(max(self._nbytes, 1))
        view = self._image.view
        for item in self._fetched:
            key, at = self._key_of(item.need.file), item.record.at
            if item.spans:
                yield Read(key, at + item.runs.offsets[0], view[item.offset : item.offset + item.nbytes])
                continue
            position, size = item.offset, item.runs.nbytes
            for offset in item.runs.offsets:
                yield Read(key, at + offset, view[position : position + size])
                position += size

    def _summed(self, item: Fetched) -> Iterator[Summed]:
        view, size, first = self._image.view, item.runs.nbytes, item.runs.offsets[0]
        for number, offset in enumerate(item.runs.offsets):
            at = item.offset + (offset - first if item.spans else number * size)
            yield offset, size, crc32(view[at : at + size])

    def _tensor(self, item: Fetched) -> torch.Tensor:
        """The region's elements, in the shape of its box; a view of the buffer."""
        dtype = getattr(torch, item.record.dtype)
        shape = item.need.region.lengths
        if not item.spans:
            return self._image.tensor(item.offset, dtype, shape)
        strides = torch.empty(item.record.shape, device="meta").stride()
        flat = self._image.tensor(item.offset, dtype, (item.nbytes // dtype.itemsize,))
        return flat.as_strided(shape, strides)


def judge(items: Iterable[tuple[Fetched, Iterable[Summed]]]) -> tuple[list[str], list[PartialSum]]:
    """(files with a damaged record, sums of the records that were read in part), from the pieces of each region."""
    damaged, partial = set(), []
    for item, summed in items:
        record, need = item.record, item.need
        if record.crc == NO_SUM:
            continue
        if item.is_whole:
            if combine((crc, nbytes) for _, nbytes, crc in summed)[0] != record.crc:
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
    inside = len(region.start) == len(record.shape) and all(
        start + length <= size for start, length, size in zip(region.start, region.lengths, record.shape, strict=True)
    )
    if entry is None or record.dtype != entry.dtype or not inside:
        raise ValueError(f"{file} and the record do not say the same of {name}")
