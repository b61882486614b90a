"""Read straight into the state, and sum up while the bytes are still in the processor's cache: one pass over memory.

Nothing is left of the state that was there before, whether the bytes turn out to be sound or not, so this is for those
who ask for it (`LoadPolicy.in_place`). What can be is looked at first, as ever: sizes, indexes, trees, all bytes around
the tensors, and the regions that cannot be read straight (of another dtype, on another device, in short runs).

What was tried (2026-11-26, 2 cores of an Intel Xeon with 4 MiB of L2 in all, kernel 6.18, 1 GB in the page cache, two
threads, seven rounds by turns, ms/GB, median and range):

    pread, nothing summed up                              77 (75-220)    the limit
    pread and CRC of what was read, 512 KiB by 512 KiB     88 (86-99)
    the same in pieces of 128 KiB, 256 KiB, 1 MiB, 8 MiB   97, 90, 92, 106
    CRC where it lies, then copy it from there, by MiB    106 (103-116)
    first the CRC of all, then the copy of all (`borrow`)  31 + 80
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch.autograd.graph import increment_version

from shardckpt.engine.loading.fetching.borrow import Borrowed, fetch_from, present
from shardckpt.engine.loading.fetching.fetch import Fetch, Fetched, KeyOf, Need, Summed, judge
from shardckpt.engine.loading.fetching.gate import Gate, unfinished
from shardckpt.engine.loading.fetching.meter import UNWATCHED, Meter
from shardckpt.engine.loading.fetching.pieces import Unit, units
from shardckpt.engine.loading.integrity import PartialSum, runs_of
from shardckpt.engine.patience import within
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredRecord
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.transfer.lending import LendingStorage, Lent
from shardckpt.storage.transfer.several import for_each

_PIECE = 512 << 10
_SHORT = 16 << 10
"""A region in shorter runs than that is looked at where it lies and copied by torch."""
_GAP = 4 << 10
"""Bytes between two pieces that are read along with them, into nowhere."""
_MOST_BUFFERS = 512


@dataclass(slots=True)
class _Piece:
    """Bytes of a file, where they go, and their CRC once they have come."""

    start: int
    offset: int
    """In the record."""
    into: memoryview
    crc: int = 0

    @property
    def nbytes(self) -> int:
        return len(self.into)

    @property
    def end(self) -> int:
        return self.start + len(self.into)

    @property
    def spans(self) -> Iterable[tuple[int, int]]:
        return ((self.start, self.end),)


class Straight(Borrowed):
    """As `Borrowed`, but for the regions whose place could be told before they are read."""

    def __init__(self, storage: LendingStorage, key_of: KeyOf, meter: Meter = UNWATCHED) -> None:
        super().__init__(storage, key_of, meter)
        self._straight: dict[str, list[tuple[Fetched, list[_Piece]]]] = {}
        self._places: list[torch.Tensor] = []
        self._taken: list[tuple[int, int]] = []  # stretches of memory, in order

    def take(self, need: Need, record: StoredRecord, place: torch.Tensor) -> bool:
        """Have a region read into this place by `stream`; False if it must go another way (`add`, `read`, `fill`)."""
        item = Fetched(need, record, runs_of(record, need.region))
        flat = _bytes_of(place, record.dtype)
        in_short_runs = len(item.runs.offsets) > 1 and item.runs.nbytes < _SHORT
        if flat is None or in_short_runs or self._is_shared(place):
            return False
        insort(self._taken, (place.data_ptr(), place.data_ptr() + len(flat)))
        self._places.append(place)
        self._straight.setdefault(self._key_of(need.file), []).append((item, list(_pieces(item, flat))))
        return True

    def _is_shared(self, place: torch.Tensor) -> bool:
        """Whether it has memory in common with one that was taken: tied in the state, but perhaps not in the file. Two
        threads must not fill that at once, each summing up what it finds there; the later one is copied afterwards."""
        start = place.data_ptr()
        number = bisect_right(self._taken, (start, start))
        before, behind = self._taken[max(number - 1, 0) : number], self._taken[number : number + 1]
        return any(end > start for _, end in before) or any(first < start + place.nbytes for first, _ in behind)

    def stream(self, timeout: timedelta) -> tuple[list[str], list[PartialSum]]:
        """Read all that was taken. Gives the files with a damaged record, and the sums of what was read in part.

        `CheckpointLoadError` if it breaks off or takes longer than `timeout`; what has not come by then never will.
        In threads of its own.
        """
        with unfinished(self._gate, "bytes that are read straight into the state could not be read"):
            within(timeout, self._stream, what="reading")
        for place in self._places:
            if not place.is_inference():
                increment_version(place)  # the bytes came past torch, which may hold some for a backward pass
        items = [found for those in self._straight.values() for found in those]
        return judge((item, _summed(pieces)) for item, pieces in items)

    def _stream(self) -> None:
        self._meter.begin("reading", (item.runs.total for those in self._straight.values() for item, _ in those))
        for key, those in sorted(self._straight.items()):
            pieces = sorted((piece for _, pieces in those for piece in pieces), key=lambda piece: piece.start)
            with self._borrowed(key) as lent:
                for_each(units(pieces), partial(_take, lent, self._gate, self._meter), threads=self._threads)


def fetch_straight_from(storage: Storage, key_of: KeyOf, files: Iterable[str], meter: Meter) -> Fetch:
    """As `fetch_from`; straight into the state where the storage lends its files, else by way of memory of our own."""
    found = fetch_from(storage, key_of, files, meter)
    if isinstance(found, Borrowed) and isinstance(storage, LendingStorage):
        return Straight(storage, key_of, meter)
    return found


def _take(lent: Lent, gate: Gate, meter: Meter, unit: Unit[_Piece]) -> None:
    """What is in the page cache comes at once; what is not is brought first, so that nobody waits within the gate."""
    left = _taken(lent, gate, unit.parts, wait=False)
    if left:
        with present(lent, Unit(left)):
            _taken(lent, gate, left, wait=True)
    meter.add(unit.nbytes)


def _taken(lent: Lent, gate: Gate, pieces: list[_Piece], *, wait: bool) -> list[_Piece]:
    """Takes the pieces; gives those that are left because they would have to be waited for."""
    done = 0
    with gate.passing():
        for bundle in _bundles(pieces):
            if not lent.take(bundle[0].start, _buffers(bundle), wait=wait):
                break
            for piece in bundle:
                piece.crc = crc32(piece.into)
            done += len(bundle)
    return pieces[done:]


def _bundles(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours that one call reads, all of which stay in the cache."""
    bundle: list[_Piece] = []
    for piece in pieces:
        if bundle:
            near = 0 <= piece.start - bundle[-1].end <= _GAP
            if not near or piece.end - bundle[0].start > _PIECE or len(bundle) == _MOST_BUFFERS:
                yield bundle
                bundle = []
        bundle.append(piece)
    if bundle:
        yield bundle


def _buffers(bundle: Sequence[_Piece]) -> list[memoryview]:
    buffers = [bundle[0].into]
    for before, piece in pairwise(bundle):
        if piece.start > before.end:
            buffers.append(memoryview(bytearray(piece.start - before.end)))
        buffers.append(piece.into)
    return buffers


def _pieces(item: Fetched, flat: memoryview) -> Iterator[_Piece]:
    size = item.runs.nbytes
    for number, offset in enumerate(item.runs.offsets):
        for start in range(0, size, _PIECE):
            at = number * size + start
            into = flat[at : at + min(_PIECE, size - start)]
            yield _Piece(item.record.at + offset + start, offset + start, into)


def _summed(pieces: Sequence[_Piece]) -> Iterator[Summed]:
    return ((piece.offset, piece.nbytes, piece.crc) for piece in pieces)


def _bytes_of(place: torch.Tensor, dtype: str) -> memoryview | None:
    """The memory of a tensor that is nothing but its elements in a row, of that dtype and in this process."""
    plain = type(place) in (torch.Tensor, torch.nn.Parameter) and place.device.type == "cpu" and place.numel() > 0
    if not plain or place.dtype != getattr(torch, dtype) or place.layout != torch.strided or not place.is_contiguous():
        return None
    if place.is_conj() or place.is_neg():
        return None
    flat = place.detach().as_strided((place.numel(),), (1,))  # one element in a row of 1 may have any stride
    return memoryview(cast(Buffer, flat.view(torch.uint8).numpy()))
