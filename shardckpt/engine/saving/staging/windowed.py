"""A file that is written from live memory through windows of a fixed size: no copy of the state is ever held.

The bytes are those of the image to the last one. The sums of all tensors are taken first, since the headers, which
come before their data, hold them; when a tensor then goes by, it is summed up again, and must not have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from shardckpt.engine.consolidated.assembling.windows import Windows
from shardckpt.engine.consolidated.fragments import WINDOW, contents_of
from shardckpt.engine.saving.staging.file import StagedFile, Wanted, changed_error
from shardckpt.engine.saving.write import Sealed, SealedFile, SealedRange
from shardckpt.format.archive import front_of, header_of
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.manifest import FileEntry


class WindowedFile(StagedFile):
    """The state must not change until what `seal` gives has been written."""

    def __init__(self) -> None:
        super().__init__()
        self._cut: dict[int, int] = {}
        """By record of which only a part is in this rank's share: the sum of that part."""

    def jobs(self, wanted: Wanted) -> Iterable[Callable[[], None]]:
        """Sums."""
        assert self._file is not None
        for number, record in enumerate(self._file.records):
            if record.nbytes and wanted(record.tensor):
                yield self._sum_job(number, record.tensor)
                first, last = self._within_share(number)
                if 0 < last - first < record.nbytes:
                    yield self._cut_job(number, record.tensor)

    def seal(self, rank: int, *, threads: int) -> Sealed | None:
        assert self._file is not None
        layout, share, name = self._layout, self._share, self._file.name
        crcs = [crc or 0 for crc in self._crcs]  # none of a record without bytes
        self._crcs = [*crcs]
        if share.is_empty:
            return None
        if not share.tail:
            return SealedRange(name, self._windows(crcs, b""), share.start, share.end, share.numbers)
        tail = self._tail(crcs)
        sums = [(crc32(front := front_of(layout)), len(front))]
        for slot, crc in zip(layout.slots, crcs, strict=True):
            sums += [(crc32(header := header_of(slot, crc)), len(header)), (crc, slot.nbytes)]
        crc, nbytes = combine([*sums, (crc32(tail.content), len(tail.content))])
        entry = FileEntry(name, nbytes, crc, self._file.home, rank, tail.index, tail.tree)
        place = (share.start, share.whole, share.numbers)
        return SealedFile(entry, self._windows(crcs, tail.content), self.digests, *place)

    def _cut_job(self, number: int, tensor: torch.Tensor) -> Callable[[], None]:
        def sum_up() -> None:
            crc = 0
            for piece in contents_of(tensor, *self._within_share(number)):
                crc = crc32(piece, crc)
            self._cut[number] = crc

        return sum_up

    def _within_share(self, number: int) -> tuple[int, int]:
        """Which bytes of a record are in this rank's share."""
        slot, share = self._layout.slots[number], self._share
        return max(0, share.start - slot.data), max(0, min(slot.nbytes, share.end - slot.data))

    def _windows(self, crcs: list[int], tail: bytes) -> Iterator[memoryview]:
        """The share, window by window. The memory of each is its own for as long as anybody holds it."""
        pool = Windows()
        window, filled = pool.take(), 0
        for number, content in self._stream(crcs, tail):
            crc = 0
            for piece in content:
                view = piece
                while len(view):
                    taken = window.data[filled : filled + len(view)]
                    taken[:] = view[: len(taken)]
                    crc, filled, view = crc32(taken, crc), filled + len(taken), view[len(taken) :]
                    if filled == WINDOW:
                        yield window.data
                        del taken  # it would keep the window from being used again
                        window, filled = pool.take(), 0
            if number is not None and crc != self._cut_or_whole(number, crcs):
                raise changed_error(self._names_of({number}))
        if filled:
            yield window.data[:filled]

    def _cut_or_whole(self, number: int, crcs: list[int]) -> int:
        first, last = self._within_share(number)
        return crcs[number] if last - first == self._layout.slots[number].nbytes else self._cut[number]

    def _stream(self, crcs: list[int], tail: bytes) -> Iterator[tuple[int | None, Iterable[memoryview]]]:
        """The share from its first byte to its last: headers, and the content of records with their numbers."""
        assert self._file is not None
        share = self._share
        if share.start == 0:
            yield None, [memoryview(front_of(self._layout))]
        for number, (slot, record) in enumerate(zip(self._layout.slots, self._file.records, strict=True)):
            if share.touches(slot.header, slot.data):
                first, last = max(share.start, slot.header), min(share.end, slot.data)
                header = header_of(slot, crcs[number])
                yield None, [memoryview(header)[first - slot.header : last - slot.header]]
            first, last = self._within_share(number)
            if first < last:
                yield number, contents_of(record.tensor, first, last)
        yield None, [memoryview(tail)]
