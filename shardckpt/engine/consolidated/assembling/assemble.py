"""Assemble the consolidated file: an archive as any other of ours, put through windows of bounded size.

The layout of the archive follows from the tensors' sizes, and the CRC of every record from the ranks' sums, so headers
come before their data. Some windows at a time are filled by one vectored read. Where a tensor is cut along a dimension
that is not its first, a read brings whole rows of a part, which are then put in their places: never a read for a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.engine.consolidated.assembling.reading import Nearby, Parts, Place, Reading
from shardckpt.engine.consolidated.assembling.whole import WholeTensor
from shardckpt.engine.consolidated.assembling.windows import Windows
from shardckpt.engine.consolidated.fragments import WINDOW
from shardckpt.engine.loading.integrity import sum_among_zeros
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.archive import ArchiveLayout, Slot, Tail, front_of, header_of, lay_out, make_tail
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.manifest import FileEntry
from shardckpt.format.tree import encode_tree

_LEAST, _MOST = 8 << 20, 64 << 20
"""Bytes read at once: half of the largest tensor, within these bounds. Object stores want many requests at a time."""


class Archive:
    """The file that is made of whole tensors: known before any byte of them, from their sizes and CRCs."""

    def __init__(self, tensors: Sequence[WholeTensor]) -> None:
        self._tensors = tensors
        self.layout = lay_out([tensor.nbytes for tensor in tensors])
        self._crcs = [tensor.crc for tensor in tensors]
        self._largest = max((tensor.nbytes for tensor in tensors), default=0)

    def tail(self, tree: Any, boxes: Sequence[StoredBox]) -> Tail:
        records = [
            StoredRecord(tensor.dtype, tensor.shape, slot.data, slot.nbytes, tensor.crc)
            for tensor, slot in zip(self._tensors, self.layout.slots, strict=True)
        ]
        return make_tail(self.layout, self._crcs, encode_index(records, boxes), encode_tree(tree))

    def entry(self, key: str, tail: Tail) -> FileEntry:
        """Its entry for the record, named as the key's last part."""
        front = front_of(self.layout)
        sums = [(crc32(front), len(front))]
        for slot, crc in zip(self.layout.slots, self._crcs, strict=True):
            header = header_of(slot, crc)
            sums += [(crc32(header), len(header)), (crc, slot.nbytes)]
        crc, nbytes = combine([*sums, (crc32(tail.content), len(tail.content))])
        return FileEntry(key.rpartition("/")[2], nbytes, crc, "consolidated", 0, tail.index, tail.tree)

    def windows(
        self, parts: Parts, sources: Iterable[WholeTensor], stretch: tuple[int, int], *, partly: dict[str, int]
    ) -> Iterator[memoryview]:
        """The bytes of a stretch of what comes before the tail, one window after the other; the memory of each is its
        own for as long as anybody holds it. `sources`, gone through once, are the tensors with their sources.

        A tensor that ends in it is checked if it began there, too: `CheckpointDamagedError` if its bytes are not those
        that its ranks have summed up. Of one that does not lie in it whole, `partly` gets the sum of what does.
        """
        at_once = max(min(max(self._largest // 2, _LEAST), _MOST) // WINDOW, 1)
        image = _Image(parts, self.layout, self._crcs, at_once=at_once, partly=partly)
        return image.windows(iter(sources), *stretch)


@dataclass(slots=True)
class _Open:
    """A tensor at which the windows are; `crc` is of what has been put of it."""

    slot: Slot
    header: bytes
    nearby: Nearby
    first: int
    """The first of its bytes that is put."""
    crc: int = 0


@dataclass(frozen=True, slots=True)
class _Window:
    """Bytes `start` to `stop` of the file, and the tensors of which they have some."""

    start: int
    stop: int
    view: memoryview
    tensors: tuple[_Open, ...]

    def cut(self, first: int, last: int) -> tuple[int, int]:
        """What lies in it of these bytes of the file; an empty range if nothing does."""
        return max(self.start, first), max(self.start, first, min(self.stop, last))


class _Image:
    """The fixed part of the archive, window by window."""

    def __init__(
        self, parts: Parts, layout: ArchiveLayout, crcs: Sequence[int], *, at_once: int, partly: dict[str, int]
    ) -> None:
        """`at_once`: how many windows are filled by one read."""
        self._parts = parts
        self._layout = layout
        self._crcs = crcs
        self._at_once = at_once
        self._partly = partly
        self._pool = Windows()
        self._reading = Reading(parts, torch.empty(at_once * WINDOW, dtype=torch.uint8))
        self._front = front_of(layout)

    def windows(self, tensors: Iterator[WholeTensor], first: int, last: int) -> Iterator[memoryview]:
        """See `Archive.windows`."""
        batch: list[_Window] = []
        opened: list[_Open] = []
        coming = self._coming(tensors, first, last)
        waiting = next(coming, None)
        for start in range(first, last, WINDOW):
            stop = min(start + WINDOW, last)
            while waiting is not None and waiting.slot.header < stop:
                opened.append(waiting)
                waiting = next(coming, None)
            batch.append(self._begin(start, stop, opened))
            opened = [item for item in opened if item.slot.end > stop]
            if len(batch) == self._at_once or stop == last:
                self._reading.finish()
                while batch:
                    yield self._end(batch.pop(0), last)
        for _ in coming:  # to its end, where the tensors check themselves
            raise AssertionError("there are more tensors than records")

    def _coming(self, tensors: Iterator[WholeTensor], first: int, last: int) -> Iterator[_Open]:
        """The tensors of which there is something in the stretch, with their headers."""
        for slot, crc, tensor in zip(self._layout.slots, self._crcs, tensors, strict=True):
            if slot.header < last and slot.end > first:
                yield _Open(slot, header_of(slot, crc), Nearby(tensor), max(first - slot.data, 0))

    def _begin(self, start: int, stop: int, opened: Sequence[_Open]) -> _Window:
        array = self._pool.take()
        window = _Window(start, stop, array.data[: stop - start], tuple(opened))
        memory = torch.from_numpy(array)
        front = self._front[start:stop]
        window.view[: len(front)] = front
        for item in opened:
            slot = item.slot
            first, last = window.cut(slot.header, slot.data)
            window.view[first - start : last - start] = item.header[first - slot.header : last - slot.header]
            first, last = window.cut(slot.data, slot.end)
            if first < last:
                place = Place(memory, window.view, first - start)
                self._reading.add(place, item.nearby, first - slot.data, last - slot.data)
        return window

    def _end(self, window: _Window, last: int) -> memoryview:
        """The window, checked as far as tensors end in it; `last`: where the stretch does."""
        for item in window.tensors:
            slot, tensor = item.slot, item.nearby.tensor
            start, stop = window.cut(slot.data, slot.end)
            item.crc = crc32(window.view[start - window.start : stop - window.start], item.crc)
            if window.stop < min(slot.end, last):
                continue
            if item.first == 0 and slot.end <= last:
                if item.crc != tensor.crc:
                    raise self._damaged(tensor)
            elif stop - slot.data > item.first:
                had = item.first, stop - slot.data - item.first, item.crc
                self._partly[tensor.name] = sum_among_zeros(slot.nbytes, [had])
        return window.view

    def _damaged(self, tensor: WholeTensor) -> CheckpointDamagedError:
        read = {source.rank for source in tensor.sources if self._parts.has(tensor.name, source) is None}
        files = ", ".join(self._parts.files(rank) for rank in sorted(read)[:10])
        return CheckpointDamagedError(
            f"{tensor.name} is not what its ranks held: of a part of it {self._parts.storage.url} gives other bytes "
            f"than were put there ({files or 'or it has changed in memory meanwhile'}); save again, and test it"
        )
