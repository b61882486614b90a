"""Stage: copy this rank's part of the state to its final place in the images of its files. The snapshot is the file.

`Stager.prepare` runs on the caller's thread and only lays out; the copies of what may change at once run there
too; the copies of parameters and optimizer state run on the save thread while the next forward and backward run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from shardckpt.engine.saving.image import Image, copy_small, slices
from shardckpt.engine.saving.plan import FilePlan, SavePlan
from shardckpt.engine.saving.share import Share, share_out
from shardckpt.engine.saving.write import Sealed, SealedFile, SealedRange
from shardckpt.format.archive import (
    LARGE,
    ArchiveLayout,
    Slot,
    Tail,
    file_crc,
    lay_out,
    make_tail,
    write_crcs,
    write_headers,
)
from shardckpt.format.checksum import crc32, to_hex, value_digest
from shardckpt.format.index import IndexText, StoredRecord, index_text
from shardckpt.format.manifest import FileEntry, Home
from shardckpt.storage.transfer.several import for_each

_TAIL, _TAIL_OF_RECORD = 1 << 20, 1 << 10
"""Room for index, pickle and directory: bytes of address space, which cost nothing until they are touched."""


class Stager:
    """Keeps the images and layouts from save to save. One per manager; used for one save at a time."""

    def __init__(self, *, in_ranges: bool = False, threads: int = 2) -> None:
        """`in_ranges`: whether the storage can put ranges of a file, so that several ranks can share one."""
        self._slots: dict[Home, _FileStage] = {}
        self._in_ranges = in_ranges
        self._threads = threads

    @property
    def nbytes(self) -> int:
        """Host memory held by the images."""
        return sum(stage.image.capacity for stage in self._slots.values())

    def prepare(self, plan: SavePlan, *, rank: int) -> Staging:
        """Lay the files out and have memory for them. Copies nothing yet."""
        stages = []
        for file in plan.files:
            stage = self._slots.setdefault(file.home, _FileStage())
            stage.lay_out(file, in_ranges=self._in_ranges)
            stages.append(stage)
        return Staging(stages, plan, rank=rank, threads=self._threads)

    def forsake(self) -> None:
        """Have new images next time: a writer that may still wake up holds on to these."""
        self._slots = {}

    def close(self) -> None:
        """Give the memory back."""
        self._slots = {}


class Staging:
    """One save's way into the images."""

    def __init__(self, stages: list[_FileStage], plan: SavePlan, *, rank: int, threads: int) -> None:
        self._stages = stages
        self._plan = plan
        self._rank = rank
        self._threads = threads
        self._alike: dict[str, dict[str, str]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes, the tails not counted."""
        return sum(stage.nbytes for stage in self._stages)

    def copy(self, wanted: Callable[[torch.Tensor], bool]) -> None:
        """Copy the tensors for which `wanted` holds, and sum up those that others write. Done when it returns."""
        jobs: list[Callable[[], None]] = []
        for stage in self._stages:
            jobs += stage.jobs(wanted)
        for_each(jobs, lambda job: job(), threads=self._threads)
        for group, tensors in self._plan.alike.items():
            digests = self._alike.setdefault(group, {})
            for name, tensor in tensors:
                if wanted(tensor):
                    digests[name] = _digest(tensor.dtype, tuple(tensor.shape), _crc_of(tensor))

    def seal(self) -> list[Sealed]:
        """Checksums, indexes and directories: what this rank writes is complete. After all copies."""
        sealed = [stage.seal(self._rank, threads=self._threads) for stage in self._stages]
        return [file for file in sealed if file is not None]

    def alike(self) -> dict[str, dict[str, str]]:
        """By group: what this rank holds of tensors that one rank writes for several, or that several write. After
        `seal`; `SavePlan.alike` and `FilePlan.sharers` say which."""
        shared = {stage.name: stage.held(self._plan.values) for stage in self._stages if stage.is_shared}
        written = {name: text for stage in self._stages for name, text in stage.digests.items()}
        copied = {group: {name: written[name] for name in names} for group, names in self._plan.copied.items()}
        return {group: dict(digests) for group, digests in self._alike.items()} | copied | shared


class _FileStage:
    """One file's image and its layout, reused while the records keep their shapes and dtypes.

    Of a file that others write, too, only what lies in this rank's share is copied; the rest is summed up where it is.
    """

    def __init__(self) -> None:
        self.image = Image()
        self.digests: dict[str, str] = {}
        """After `seal`: by tensor."""
        self._signature: list[tuple[str, tuple[int, ...]]] | None = None
        self._layout = ArchiveLayout((), ())
        self._share = Share(0, 0, tail=True, whole=True)
        self._targets: list[torch.Tensor] = []
        self._file: FilePlan | None = None
        self._small: list[int] = []
        self._others: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._index: IndexText | None = None
        self._kinds: list[tuple[str, int, str]] = []
        """Of each box its tensor, its record, and the beginning of its digest."""
        self._crcs: list[int | None] = []
        self._headers_due = False

    @property
    def name(self) -> str:
        return self._file.name if self._file is not None else ""

    @property
    def is_shared(self) -> bool:
        return self._file is not None and self._file.sharers > 1

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's share: tensors with their headers; the tail comes on top."""
        return self._share.end - self._share.start

    def held(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What every rank that plans this file must hold alike: the layout, the tensors, the Python values."""
        assert self._file is not None
        own = {name: value_digest(values[name]) for name in self._file.values}
        return {f"the layout of {self.name}": value_digest(self._signature), **self.digests, **own}

    def lay_out(self, file: FilePlan, *, in_ranges: bool) -> None:
        """On the caller's thread, so it touches no page: fresh memory costs a tenth of a second per 100 MB."""
        is_again = self._file is not None and file.boxes is self._file.boxes  # of a plan that was made again
        signature = self._signature if is_again else [(record.dtype, record.shape) for record in file.records]
        if signature != self._signature:
            self._layout = lay_out([record.nbytes for record in file.records])
        if not is_again:
            self._index, self._kinds = None, []
        self._file = file
        self._crcs = [None] * len(file.records)
        who: dict[str, Any] = {"home": file.home, "sharers": file.sharers, "place": file.place}
        share = share_out(self._layout.tail, in_ranges=in_ranges, **who)
        fresh = self.image.reserve(self._layout.tail + _TAIL + _TAIL_OF_RECORD * len(file.records))
        if fresh or signature != self._signature or share != self._share:
            self._signature, self._share = signature, share
            self._headers_due = True
            self._targets = [
                self.image.tensor(slot.data, record.tensor.dtype, record.shape)
                for slot, record in zip(self._layout.slots, file.records, strict=True)
            ]
            self._sort_records()

    def _sort_records(self) -> None:
        """Which records are copied together, and which one by one."""
        slots = self._layout.slots
        self._small = [n for n, slot in enumerate(slots) if 0 < slot.nbytes < LARGE and self._is_staged(slot)]
        small = set(self._small)
        self._others = [n for n, slot in enumerate(slots) if slot.nbytes and n not in small]
        self._spans = [(slot.data, slot.end) for slot in slots]

    def jobs(self, wanted: Callable[[torch.Tensor], bool]) -> Iterable[Callable[[], None]]:
        """What is to be done now for the wanted tensors: copies into the image, sums of what is not copied."""
        assert self._file is not None
        records, targets = self._file.records, self._targets
        for number in self._others:
            slot, tensor = self._layout.slots[number], records[number].tensor
            if not wanted(tensor):
                continue
            if not self._is_staged(slot):
                yield self._sum_job(number, tensor)
            if slot.nbytes >= LARGE and self._share.touches(slot.data, slot.end):
                yield from slices(targets[number], tensor, slot.data, self._share)
        small = [number for number in self._small if wanted(records[number].tensor)]
        if small:
            yield lambda: copy_small([targets[n] for n in small], [records[n].tensor for n in small])

    def _is_staged(self, slot: Slot) -> bool:
        """Whether all of a record comes into the image. Whoever makes the tail needs all small ones for its sum."""
        return self._share.covers(slot.data, slot.end) or (self._share.tail and slot.nbytes < LARGE)

    def _sum_job(self, number: int, tensor: torch.Tensor) -> Callable[[], None]:
        def sum_up() -> None:
            self._crcs[number] = _crc_of(tensor)

        return sum_up

    def seal(self, rank: int, *, threads: int) -> Sealed | None:
        """None if others write all of it."""
        assert self._file is not None
        layout, file, share, view = self._layout, self._file, self._share, self.image.view
        crcs = self._all_crcs(view, threads)
        self.digests = self._all_digests(crcs)
        if share.is_empty:
            return None
        within = None if share.tail else share.range  # whoever makes the tail sums up all headers
        if self._headers_due:
            write_headers(layout, view, within=within)
            self._headers_due = False
        write_crcs(layout, view, crcs, within=within)
        if not share.tail:
            return SealedRange(file.name, (view[share.start : share.end],), share.start, share.end)
        tail = self._tail(crcs)
        self._file = replace(file, records=())  # nothing of a state is held from one save to the next
        nbytes, crc = layout.tail + len(tail.content), file_crc(layout, view, crcs, tail)
        entry = FileEntry(file.name, nbytes, crc, file.home, rank, tail.index, tail.tree)
        return SealedFile(entry, self._with_tail(tail.content), dict(self.digests), share.start, share.whole)

    def _all_crcs(self, view: memoryview, threads: int) -> list[int]:
        """Of all records: of those in the image from there, of the others from `copy`."""
        slots = self._layout.slots
        large = [number for number, slot in enumerate(slots) if slot.nbytes >= LARGE and self._is_staged(slot)]

        def sum_up(number: int) -> None:
            self._crcs[number] = crc32(view[slots[number].data : slots[number].end])

        for_each(large, sum_up, threads=threads)
        pairs = zip(self._crcs, self._spans, strict=True)
        return [crc32(view[start:end]) if crc is None else crc for crc, (start, end) in pairs]

    def _all_digests(self, crcs: Sequence[int]) -> dict[str, str]:
        """By tensor."""
        assert self._file is not None
        if not self._kinds:
            records = self._file.records
            kinds = [(stored.name, stored.record, records[stored.record]) for stored in self._file.boxes]
            self._kinds = [(name, number, _kind(record.dtype, record.shape)) for name, number, record in kinds]
        return {name: f"{kind}{crcs[number]:08x}" for name, number, kind in self._kinds}

    def _with_tail(self, tail: bytes) -> tuple[memoryview, ...]:
        """The image with its tail behind it; a tail that is larger than any that was thought of stays by itself."""
        view, start, first = self.image.view, self._layout.tail, self._share.start
        if start + len(tail) > len(view):
            return view[first:start], memoryview(tail)
        view[start : start + len(tail)] = tail
        return (view[first : start + len(tail)],)

    def _tail(self, crcs: Sequence[int]) -> Tail:
        assert self._file is not None
        if self._index is None:
            records = [
                StoredRecord(record.dtype, record.shape, slot.data, slot.nbytes, 0)
                for record, slot in zip(self._file.records, self._layout.slots, strict=True)
            ]
            self._index = index_text(records, self._file.boxes)
        return make_tail(self._layout, crcs, self._index.with_crcs(crcs), self._file.tree.encode())


def _digest(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> str:
    return _kind(str(dtype).removeprefix("torch."), shape) + to_hex(crc)


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _crc_of(tensor: torch.Tensor) -> int:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return crc32(flat.numpy().data) if flat.numel() else 0
