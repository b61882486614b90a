"""Assemble the consolidated file on rank 0: an archive as any other of ours, put through windows of bounded size.

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
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.archive import ArchiveLayout, Slot, front_of, header_of, lay_out, make_tail
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.manifest import FileEntry
from shardckpt.format.tree import encode_tree

_LEAST, _MOST = 8 << 20, 64 << 20
"""Bytes read at once: half of the largest tensor, within these bounds. Object stores want many requests at a time."""


def assemble(
    parts: Parts,
    key: str,
    *,
    tensors: Sequence[WholeTensor],
    sources: Iterable[WholeTensor],
    tree: Any,
    boxes: Sequence[StoredBox],
    most_nbytes: int = _MOST,
) -> FileEntry:
    """Put the archive of all tensors under `key`; gives its entry for the record, named as the key's last part.

    `tensors` say what is in the archive; `sources`, gone through once, are the same with their sources. No more than
    `most_nbytes` are read at once, but always a window.
    `CheckpointDamagedError` if the bytes of a part are not those that its rank has summed up.
    """
    layout = lay_out([tensor.nbytes for tensor in tensors])
    crcs = [tensor.crc for tensor in tensors]
    records = [
        StoredRecord(tensor.dtype, tensor.shape, slot.data, slot.nbytes, tensor.crc)
        for tensor, slot in zip(tensors, layout.slots, strict=True)
    ]
    tail = make_tail(layout, crcs, encode_index(records, boxes), encode_tree(tree))
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    image = _Image(parts, layout, crcs, at_once=max(min(max(largest // 2, _LEAST), most_nbytes) // WINDOW, 1))

    def windows() -> Iterator[memoryview]:
        yield from image.windows(iter(sources))
        yield memoryview(tail.content)

    nbytes = parts.storage.put(key, windows())
    crc, counted = combine([*image.sums(), (crc32(tail.content), len(tail.content))])
    assert nbytes == counted, f"{key}: {nbytes} bytes were put of {counted}"
    return FileEntry(key.rpartition("/")[2], nbytes, crc, "consolidated", 0, tail.index, tail.tree)


@dataclass(slots=True)
class _Open:
    """A tensor at which the windows are; `crc` is of what has been put of it."""

    slot: Slot
    header: bytes
    nearby: Nearby
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

    def __init__(self, parts: Parts, layout: ArchiveLayout, crcs: Sequence[int], *, at_once: int) -> None:
        """`at_once`: how many windows are filled by one read."""
        self._parts = parts
        self._layout = layout
        self._crcs = crcs
        self._at_once = at_once
        self._pool = Windows()
        self._reading = Reading(parts, torch.empty(at_once * WINDOW, dtype=torch.uint8))
        self._front = front_of(layout)

    def sums(self) -> Iterator[tuple[int, int]]:
        """(crc, nbytes) of everything in it, in order."""
        yield crc32(self._front), len(self._front)
        for slot, crc in zip(self._layout.slots, self._crcs, strict=True):
            header = header_of(slot, crc)
            yield crc32(header), len(header)
            yield crc, slot.nbytes

    def windows(self, tensors: Iterator[WholeTensor]) -> Iterator[memoryview]:
        """One after the other. The memory of each is its own for as long as anybody holds it."""
        batch: list[_Window] = []
        opened: list[_Open] = []
        coming = iter(zip(self._layout.slots, self._crcs, strict=True))
        waiting = next(coming, None)
        for start in range(0, self._layout.tail, WINDOW):
            stop = min(start + WINDOW, self._layout.tail)
            while waiting is not None and waiting[0].header < stop:
                opened.append(_Open(waiting[0], header_of(*waiting), Nearby(next(tensors))))
                waiting = next(coming, None)
            batch.append(self._begin(start, stop, opened))
            opened = [item for item in opened if item.slot.end > stop]
            if len(batch) == self._at_once or stop == self._layout.tail:
                self._reading.finish()
                while batch:
                    yield self._end(batch.pop(0))
        for _ in tensors:  # to its end, where it checks itself
            raise AssertionError("there are more tensors than records")

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

    def _end(self, window: _Window) -> memoryview:
        """The window, checked as far as tensors end in it."""
        for item in window.tensors:
            first, last = window.cut(item.slot.data, item.slot.end)
            item.crc = crc32(window.view[first - window.start : last - window.start], item.crc)
            if item.slot.end <= window.stop and item.crc != item.nearby.tensor.crc:
                raise self._damaged(item.nearby.tensor)
        return window.view

    def _damaged(self, tensor: WholeTensor) -> CheckpointDamagedError:
        read = {s.rank for s in tensor.sources if (tensor.name, s.block.offsets) not in self._parts.own}
        files = ", ".join(self._parts.files(rank) for rank in sorted(read)[:10])
        return CheckpointDamagedError(
            f"{tensor.name} is not what its ranks held: of a part of it {self._parts.storage.url} gives other bytes "
            f"than were put there ({files or 'or it has changed in memory meanwhile'}); save again, and test it"
        )
