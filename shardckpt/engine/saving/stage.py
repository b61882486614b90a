"""Stage: copy this rank's part of the state to its final place in the images of its files. The snapshot is the file.

`Stager.prepare` runs on the caller's thread and only lays out; the copies of what may change at once run there
too; the copies of parameters and optimizer state run on the save thread while the next forward and backward run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from shardckpt.engine.saving.image import Image
from shardckpt.engine.saving.plan import FilePlan, PlannedRecord, SavePlan
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
from shardckpt.format.checksum import crc32, to_hex
from shardckpt.format.index import StoredRecord, encode_index
from shardckpt.format.manifest import FileEntry, Home
from shardckpt.format.tree import encode_tree
from shardckpt.storage.transfer.several import for_each

_SLICE = 32 << 20
"""Bytes copied in one call: small enough to share a large tensor between threads, large enough not to show."""

_TAIL, _TAIL_OF_RECORD = 1 << 20, 1 << 10
"""Room for index, pickle and directory: bytes of address space, which cost nothing until they are touched."""


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A finished file image: `parts` one after the other are the file that `entry` describes."""

    entry: FileEntry
    parts: tuple[memoryview, ...]
    digests: dict[str, str]
    """For each tensor what is stored of it here, as text, to be compared with other ranks' copies."""


class Stager:
    """Keeps the images and layouts from save to save. One per manager; used for one save at a time."""

    def __init__(self, *, threads: int = 2) -> None:
        self._slots: dict[Home, _FileStage] = {}
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
            stage.lay_out(file)
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

    @property
    def nbytes(self) -> int:
        """Bytes of all files of this rank."""
        return sum(stage.nbytes for stage in self._stages)

    def copy(self, wanted: Callable[[torch.Tensor], bool]) -> None:
        """Copy the tensors for which `wanted` holds. Returns when they are in the images."""
        jobs: list[Callable[[], None]] = []
        for stage in self._stages:
            jobs += stage.copy_jobs(wanted)
        for_each(jobs, lambda job: job(), threads=self._threads)

    def sum_alike(self, wanted: Callable[[torch.Tensor], bool]) -> dict[str, dict[str, str]]:
        """By group, what this rank holds of the wanted tensors that another rank writes (see `SavePlan.alike`)."""
        return {
            group: {
                name: _digest(tensor.dtype, tuple(tensor.shape), _crc_of(tensor))
                for name, tensor in tensors
                if wanted(tensor)
            }
            for group, tensors in self._plan.alike.items()
        }

    def seal(self) -> list[SealedFile]:
        """Checksums, indexes and directories: the files are complete. After all copies."""
        return [stage.seal(self._rank, threads=self._threads) for stage in self._stages]


class _FileStage:
    """One file's image and its layout, reused while the records keep their shapes and dtypes."""

    def __init__(self) -> None:
        self.image = Image()
        self._signature: list[tuple[str, tuple[int, ...]]] | None = None
        self._layout = ArchiveLayout((), ())
        self._targets: list[torch.Tensor] = []
        self._file: FilePlan | None = None
        self._headers_due = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors with their headers; the tail comes on top."""
        return self._layout.tail

    def lay_out(self, file: FilePlan) -> None:
        """On the caller's thread, so it touches no page: fresh memory costs a tenth of a second per 100 MB."""
        signature = [(record.dtype, record.shape) for record in file.records]
        if signature != self._signature:
            self._layout = lay_out([record.nbytes for record in file.records])
        self._file = file
        fresh = self.image.reserve(self._layout.tail + _TAIL + _TAIL_OF_RECORD * len(file.records))
        if fresh or signature != self._signature:
            self._signature = signature
            self._headers_due = True
            self._targets = [
                self.image.tensor(slot.data, record.tensor.dtype, record.shape)
                for slot, record in zip(self._layout.slots, file.records, strict=True)
            ]

    def copy_jobs(self, wanted: Callable[[torch.Tensor], bool]) -> Iterable[Callable[[], None]]:
        assert self._file is not None
        small_targets, small_sources = [], []
        for target, record in zip(self._targets, self._file.records, strict=True):
            if not record.nbytes or not wanted(record.tensor):
                continue
            if record.nbytes < LARGE:
                small_targets.append(target)
                small_sources.append(record.tensor)
            else:
                yield from _slices(target, record.tensor)
        if small_targets:
            yield lambda: _copy_small(small_targets, small_sources)

    def seal(self, rank: int, *, threads: int) -> SealedFile:
        assert self._file is not None
        view, layout, file = self.image.view, self._layout, self._file
        if self._headers_due:
            write_headers(layout, view)
            self._headers_due = False
        crcs = _crcs(layout, view, threads)
        write_crcs(layout, view, crcs)
        tail = self._tail(crcs)
        nbytes = layout.tail + len(tail.content)
        crc = file_crc(layout, view, crcs, tail)
        entry = FileEntry(file.name, nbytes, crc, file.home, rank, tail.index, tail.tree)
        return SealedFile(entry, self._with_tail(tail.content), _digests(file, crcs))

    def _with_tail(self, tail: bytes) -> tuple[memoryview, ...]:
        """The image with its tail behind it; a tail that is larger than any that was thought of stays by itself."""
        view, start = self.image.view, self._layout.tail
        if start + len(tail) > len(view):
            return view[:start], memoryview(tail)
        view[start : start + len(tail)] = tail
        return (view[: start + len(tail)],)

    def _tail(self, crcs: Sequence[int]) -> Tail:
        assert self._file is not None
        records = [
            StoredRecord(record.dtype, record.shape, slot.data, slot.nbytes, crc)
            for record, slot, crc in zip(self._file.records, self._layout.slots, crcs, strict=True)
        ]
        return make_tail(self._layout, crcs, encode_index(records, self._file.boxes), encode_tree(self._file.tree))


def _crcs(layout: ArchiveLayout, view: memoryview, threads: int) -> list[int]:
    sums: dict[str, int] = {}

    def sum_up(slot: Slot) -> None:
        sums[slot.name] = crc32(view[slot.data : slot.end])

    for_each([slot for slot in layout.slots if slot.nbytes >= LARGE], sum_up, threads=threads)
    return [sums[s.name] if s.nbytes >= LARGE else crc32(view[s.data : s.end]) for s in layout.slots]


def _digests(file: FilePlan, crcs: Sequence[int]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for stored in file.boxes:
        record: PlannedRecord = file.records[stored.record]
        digests[stored.name] = _digest(record.tensor.dtype, record.shape, crcs[stored.record])
    return digests


def _digest(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}{json.dumps(shape, separators=(',', ':'))}{to_hex(crc)}"


def _crc_of(tensor: torch.Tensor) -> int:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return crc32(flat.numpy().data) if flat.numel() else 0


def _slices(target: torch.Tensor, source: torch.Tensor) -> Iterable[Callable[[], None]]:
    if source.is_contiguous() and target.numel() * target.element_size() > _SLICE:
        step = _SLICE // target.element_size()
        flat_target, flat_source = target.view(-1), source.view(-1)
        for start in range(0, flat_target.numel(), step):
            yield _copy_job(flat_target[start : start + step], flat_source[start : start + step])
    else:
        yield _copy_job(target, source)


def _copy_job(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        _raw(target).copy_(_raw(source))

    return copy


def _copy_small(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """20,000 small tensors in one call instead of 20,000."""
    with torch.no_grad():
        torch._foreach_copy_([_raw(t) for t in targets], [_raw(s) for s in sources])


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its bytes where torch has no copy for its dtype (bits8, float4, ...)."""
    name = str(tensor.dtype)
    if "bits" in name or "float4" in name:
        return tensor.contiguous().view(torch.uint8)
    return tensor
