"""A file that is staged as a whole: its image in host memory is the file, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from shardckpt.engine.saving.image import Image, copy_small, slices
from shardckpt.engine.saving.plan import FilePlan
from shardckpt.engine.saving.staging.file import StagedFile, Wanted, everything
from shardckpt.engine.saving.write import Sealed, SealedFile, SealedRange
from shardckpt.format.archive import LARGE, Slot, file_crc, write_crcs, write_headers
from shardckpt.format.checksum import crc32
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.transfer.several import bundles, for_each

_TAIL, _TAIL_OF_RECORD = 1 << 20, 1 << 10
"""Room for index, pickle and directory: bytes of address space, which cost nothing until they are touched."""
_BUNDLE = 4 << 20
"""Bytes of records that a thread copies, or sums up, in one go. Of 224 records of 131 KB, each by itself took 25 ms to
copy, where 4 MiB at a time take 9 (2026-11-28)."""


class ImagedFile(StagedFile):
    """One file's image and its layout, reused while the records keep their shapes and dtypes.

    Of a file that others write, too, only what lies in this rank's share is copied; the rest is summed up where it is.
    """

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self._image = Image(shared=shared)
        self._targets: list[torch.Tensor] = []
        self._small: list[int] = []
        self._others: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._headers_due = False

    @property
    def image(self) -> Image:
        return self._image

    def lay_out(self, file: FilePlan, *, least_share: int | None) -> bool:
        """On the caller's thread, so it touches no page: fresh memory costs a tenth of a second per 100 MB."""
        other = super().lay_out(file, least_share=least_share)
        fresh = self.image.reserve(self._layout.tail + _TAIL + _TAIL_OF_RECORD * len(file.records))
        if fresh or other:
            self._headers_due = True
            self._targets = [
                self.image.tensor(slot.data, record.tensor.dtype, record.shape)
                for slot, record in zip(self._layout.slots, file.records, strict=True)
            ]
            self._sort_records()
        return other

    def _sort_records(self) -> None:
        """Which records are copied together, and which one by one."""
        slots = self._layout.slots
        self._small = [n for n, slot in enumerate(slots) if 0 < slot.nbytes < LARGE and self._is_staged(slot)]
        small = set(self._small)
        self._others = [n for n, slot in enumerate(slots) if slot.nbytes and n not in small]
        self._spans = [(slot.data, slot.end) for slot in slots]

    def jobs(self, wanted: Wanted) -> Iterable[Callable[[], None]]:
        """Copies into the image, sums of what is not copied."""
        assert self._file is not None
        records, targets, medium = self._file.records, self._targets, list[int]()
        for number in self._others:
            slot, tensor = self._layout.slots[number], records[number].tensor
            if not wanted(tensor):
                continue
            is_staged = self._is_staged(slot)
            if not is_staged:
                yield self._sum_job(number, tensor)
            elif slot.nbytes < _BUNDLE:
                medium.append(number)
                continue
            if slot.nbytes >= LARGE and self._share.touches(slot.data, slot.end):
                yield from slices(targets[number], tensor, slot.data, self._share)
        small = self._small if wanted is everything else [n for n in self._small if wanted(records[n].tensor)]
        for bundle in (*bundles(medium, self._nbytes_of, most=_BUNDLE), *([small] if small else ())):
            yield partial(copy_small, [targets[n] for n in bundle], [records[n].tensor for n in bundle])

    def transfers(self, wanted: Wanted) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Whole records, also those that others write: they are summed up from the image, so that nobody waits."""
        assert self._file is not None
        for target, record in zip(self._targets, self._file.records, strict=True):
            if record.nbytes and wanted(record.tensor):
                yield target, record.tensor

    def _is_staged(self, slot: Slot) -> bool:
        """Whether all of a record comes into the image. Whoever makes the tail needs all small ones for its sum, and a
        small one that lies across the end of a share is copied whole by the ranks on both sides."""
        if slot.nbytes < LARGE and (self._share.tail or self._share.touches(slot.data, slot.end)):
            return True
        return self._share.covers(slot.data, slot.end)

    def seal(self, rank: int, *, threads: int) -> Sealed | None:
        """None if others write all of it."""
        assert self._file is not None
        layout, file, share, view = self._layout, self._file, self._share, self.image.view
        crcs = self._all_crcs(view, threads)
        if share.is_empty:
            return None
        within = None if share.tail else share.range  # whoever makes the tail sums up all headers
        if self._headers_due:
            write_headers(layout, view, within=within)
            self._headers_due = False
        write_crcs(layout, view, crcs, within=within)
        if not share.tail:
            return SealedRange(file.name, (view[share.start : share.end],), share.start, share.end, share.numbers)
        tail = self._tail(crcs)
        nbytes, crc = layout.tail + len(tail.content), file_crc(layout, view, crcs, tail)
        entry = FileEntry(file.name, nbytes, crc, file.home, rank, tail.index, tail.tree)
        place = (share.start, share.whole, share.numbers)
        return SealedFile(entry, self._with_tail(tail.content), self.digests, *place)

    def _all_crcs(self, view: memoryview, threads: int) -> list[int]:
        """Of all records: those that `jobs` has not summed up are in the image."""
        slots = self._layout.slots
        large = [number for number, slot in enumerate(slots) if slot.nbytes >= LARGE and self._crcs[number] is None]

        def sum_up(numbers: Sequence[int]) -> None:
            for number in numbers:
                self._crcs[number] = crc32(view[slots[number].data : slots[number].end])

        for_each(bundles(large, self._nbytes_of, most=_BUNDLE), sum_up, threads=threads)
        pairs = zip(self._crcs, self._spans, strict=True)
        crcs = [crc32(view[start:end]) if crc is None else crc for crc, (start, end) in pairs]
        self._crcs = [*crcs]
        return crcs

    def _nbytes_of(self, number: int) -> int:
        return self._layout.slots[number].nbytes

    def _with_tail(self, tail: bytes) -> tuple[memoryview, ...]:
        """The image with its tail behind it; a tail that is larger than any that was thought of stays by itself."""
        view, start, first = self.image.view, self._layout.tail, self._share.start
        if start + len(tail) > len(view):
            return view[first:start], memoryview(tail)
        view[start : start + len(tail)] = tail
        return (view[first : start + len(tail)],)
