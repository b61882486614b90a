"""Borrow what this rank needs from files that can be looked at where they lie: check it there, then copy it from there.

What was tried (2026-11, 2 cores, kernel 6.18, files of 0.8 GB in the page cache, two threads, eleven rounds by turns on
a machine with other work, s/GB for check and copy together, median and range):

    looked at where they lie (this)                 0.24 (0.13-0.34)
    read twice: into a window, then in place        0.28 (0.16-0.37)   a late read after a time-out hits the state
    read twice, both times through a window         0.44 (0.21-0.61)
    read once into fresh memory, checked, copied    0.58 (0.38-1.18)   first touch; as much memory as the state
    (not checked at all: mapped and copied          0.16 (0.08-0.20))  what torch.load(mmap=True) and a copy is
"""

from __future__ import annotations

import ctypes
import errno
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain
from typing import Protocol, TypeVar

import torch

from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.fetching.fetch import Fetch, Fetched, KeyOf, Need, Summed, judge
from shardckpt.engine.loading.fetching.gate import Gate, unfinished
from shardckpt.engine.loading.fetching.meter import UNWATCHED, Meter
from shardckpt.engine.loading.fetching.pieces import Part, Unit, copies, copy_all, cut, is_cut, threads, units
from shardckpt.engine.loading.integrity import PartialSum, runs_of
from shardckpt.engine.patience import within
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredRecord
from shardckpt.storage.base import Read, Storage
from shardckpt.storage.transfer.lending import LendingStorage, Lent
from shardckpt.storage.transfer.several import for_each

_CLOSE = 64 << 10
"""Bytes between two runs that are brought along with them: a call for each run would cost more."""
_KEPT = 64
"""Files that stay borrowed between check and copy, so that they may be deleted meanwhile."""


class _Part(Part, Protocol):
    @property
    def spans(self) -> Iterable[tuple[int, int]]:
        """The bytes that must be there: (first, behind the last) of each stretch."""
        ...


_P = TypeVar("_P", bound=_Part)


@dataclass(slots=True)
class _Look:
    """Bytes of a file to be summed up, or to be copied `into` a small buffer."""

    start: int
    nbytes: int
    offset: int = 0
    """In the record."""
    into: memoryview | None = None
    crc: int = 0

    @property
    def spans(self) -> Iterable[tuple[int, int]]:
        return ((self.start, self.start + self.nbytes),)


@dataclass(slots=True)
class _Copy:
    """Elements of a file, and the part of the state that they belong to."""

    spans: Sequence[tuple[int, int]]
    nbytes: int
    source: torch.Tensor
    place: torch.Tensor


def _spans(unit: Unit[_P]) -> list[tuple[int, int]]:
    """What has to be there for it: few stretches, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in (span for part in unit.parts for span in part.spans):
        if joined and joined[-1][0] <= start <= joined[-1][1] + _CLOSE:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def fetch_from(storage: Storage, key_of: KeyOf, files: Iterable[str], meter: Meter = UNWATCHED) -> Fetch:
    """The way to fetch regions of these files that suits the storage."""
    if isinstance(storage, LendingStorage):
        try:
            for file in files:
                storage.lend(key_of(file)).close()
                return Borrowed(storage, key_of, meter)
        except OSError as error:
            if error.errno != errno.ENODEV:  # a file system that maps nothing
                raise
    return Arena(storage, key_of, meter)


class Borrowed:
    """Regions that are looked at where they lie: once to check them, and once more to copy them.

    So the bytes must be the same both times. A file that was replaced or written to in between is found out, at the
    latest after the copy; its error says that the state is not to be used.
    """

    def __init__(self, storage: LendingStorage, key_of: KeyOf, meter: Meter = UNWATCHED) -> None:
        self._storage = storage
        self._key_of = key_of
        self._meter = meter
        self._items: dict[str, list[Fetched]] = {}
        self._kept: dict[str, Lent] = {}
        self._states: dict[str, tuple[int, ...]] = {}
        self._threads = threads()
        self._gate = Gate(self._threads)

    def add(self, need: Need, record: StoredRecord) -> Fetched:
        item = Fetched(need, record, runs_of(record, need.region))
        self._items.setdefault(self._key_of(need.file), []).append(item)
        return item

    def read(self, others: Sequence[Read]) -> tuple[list[str], list[PartialSum]]:
        around: dict[str, list[_Look]] = {}
        for read in others:
            look = _Look(read.offset, len(read.into), into=read.into)
            around.setdefault(read.key, []).append(look)
        regions = (item.runs.total for items in self._items.values() for item in items)
        self._meter.begin("reading", chain(regions, (len(read.into) for read in others)))
        looked: list[tuple[Fetched, list[_Look]]] = []
        for key in sorted({*self._items, *around}):
            items = [(item, _looks(item)) for item in self._items.get(key, ())]
            looks = [*around.get(key, ()), *(look for _, those in items for look in those)]
            with self._borrowed(key) as lent:
                look_at = partial(_look_at, lent, self._meter)
                for_each(units(sorted(looks, key=lambda look: look.start)), look_at, threads=self._threads)
            looked += items
        return judge((item, _summed(looks)) for item, looks in looked)

    def fill(self, places: Sequence[tuple[Fetched, torch.Tensor]], *, timeout: timedelta | None) -> None:
        """In threads that are left behind when time is up; what they have not begun to copy then, they never will."""
        inference = torch.is_inference_mode_enabled()  # of this thread, and told to none that it starts

        fill = partial(self._fill, places, inference=inference)
        with unfinished(self._gate, "bytes that were checked could not be read again"):
            within(timeout, fill, what="copying what was checked") if timeout is not None else fill()

    def release(self) -> None:
        while self._kept:
            self._kept.popitem()[1].close()

    def _fill(self, places: Sequence[tuple[Fetched, torch.Tensor]], *, inference: bool) -> None:
        by_key: dict[str, list[tuple[Fetched, torch.Tensor]]] = {}
        self._meter.begin("copying", (item.runs.total for item, _ in places))
        for item, place in sorted(places, key=lambda pair: pair[0].record.at):
            if place.numel():
                by_key.setdefault(self._key_of(item.need.file), []).append((item, place))
        for key, those in sorted(by_key.items()):
            with self._borrowed(key) as lent, torch.inference_mode(inference):
                elements = _Elements(lent)
                copies = (copy for item, place in those for copy in _copies(elements, item, place))
                for_each(units(copies), partial(_copy, lent, self._gate, self._meter, inference), threads=self._threads)

    @contextmanager
    def _borrowed(self, key: str) -> Iterator[Lent]:
        """The file, found to be the same before and after as it was at first."""
        lent = self._kept.get(key) or self._storage.lend(key)
        if len(self._kept) < _KEPT:
            self._kept[key] = lent
        try:
            self._compare(key, lent)
            yield lent
            self._compare(key, lent)
        finally:
            if key not in self._kept:
                lent.close()

    def _compare(self, key: str, lent: Lent) -> None:
        now = lent.state()
        if now != self._states.setdefault(key, now):
            raise OSError(errno.ESTALE, f"{key} in {self._storage.url} was written to, or replaced, during the load")


def _looks(item: Fetched) -> list[_Look]:
    """The region's bytes, run by run; of a long run, piece by piece, so that threads can share it."""
    at = item.record.at
    return [
        _Look(at + offset + start, nbytes, offset + start)
        for offset in item.runs.offsets
        for start, nbytes in cut(item.runs.nbytes)
    ]


def _summed(looks: Iterable[_Look]) -> Iterator[Summed]:
    return ((look.offset, look.nbytes, look.crc) for look in looks)


def _look_at(lent: Lent, meter: Meter, unit: Unit[_Look]) -> None:
    with present(lent, unit) as view:
        for look in unit.parts:
            found = view[look.start : look.start + look.nbytes]
            if look.into is None:
                look.crc = crc32(found)
            else:
                look.into[:] = found
    meter.add(unit.nbytes)


def _copy(lent: Lent, gate: Gate, meter: Meter, inference: bool, unit: Unit[_Copy]) -> None:
    with present(lent, unit), gate.passing():
        copy_all(((copy.source, copy.place) for copy in unit.parts), inference=inference)
    meter.add(unit.nbytes)


@contextmanager
def present(lent: Lent, unit: Unit[_P]) -> Iterator[memoryview]:
    """The file's bytes, of which those of this unit can be looked at."""
    spans = _spans(unit)
    for start, end in spans:
        lent.bring(start, end - start)
    with lent.view as view:
        yield view
    for start, end in spans:
        lent.forget(start, end - start)


def _copies(elements: _Elements, item: Fetched, place: torch.Tensor) -> Iterator[_Copy]:
    """The region as one copy; a large one whose elements lie in one row here and there, as several."""
    source, start = elements.of(item), item.record.at + item.runs.offsets[0]
    if len(item.runs.offsets) > 1 or not is_cut(source, place):
        spans = [(item.record.at + at, item.record.at + at + item.runs.nbytes) for at in item.runs.offsets]
        yield _Copy(spans, item.nbytes, source, place)
        return
    for first, piece, target in copies(source, place):
        at = start + first
        yield _Copy(((at, at + piece.nbytes),), piece.nbytes, piece, target)


class _Elements:
    """What lies in a file, as tensors. Many are views of a few, one for each dtype."""

    def __init__(self, lent: Lent) -> None:
        self._address, self._nbytes = lent.address, len(lent.view)
        self._all: dict[str, torch.Tensor] = {}

    def of(self, item: Fetched) -> torch.Tensor:
        """The region's elements where they lie, in the shape of its box."""
        record, region = item.record, item.need.region
        if record.dtype not in self._all:
            dtype = getattr(torch, record.dtype)
            self._all[record.dtype] = self._read_as(dtype, self._address, self._nbytes // dtype.itemsize)
        every = self._all[record.dtype]
        first, odd = divmod(record.at, every.itemsize)
        if odd:
            every, first = self._read_as(every.dtype, self._address + record.at, record.nbytes // every.itemsize), 0
        whole = every.as_strided(record.shape, _strides(record.shape), first)
        if item.is_whole:
            return whole
        return whole[tuple(slice(at, at + n) for at, n in zip(region.start, region.lengths, strict=True))]

    @staticmethod
    def _read_as(dtype: torch.dtype, address: int, count: int) -> torch.Tensor:
        memory = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype) if count else torch.empty(0, dtype=dtype)


@lru_cache(maxsize=256)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of elements in a row, row-major."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
