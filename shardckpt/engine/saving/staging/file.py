"""One file of a save: its layout, which is kept from save to save, and the sums and the tail that complete it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from shardckpt.engine.consolidated.fragments import contents_of
from shardckpt.engine.saving.image import Image
from shardckpt.engine.saving.plan import FilePlan
from shardckpt.engine.saving.share import Share, share_out
from shardckpt.engine.saving.write import Sealed
from shardckpt.errors import CheckpointSaveError
from shardckpt.format.archive import ArchiveLayout, Tail, lay_out, make_tail
from shardckpt.format.checksum import crc32, to_hex, value_digest
from shardckpt.format.index import IndexText, StoredRecord, index_text

Wanted: TypeAlias = Callable[[torch.Tensor], bool]
"""Whether a tensor is copied now."""


def everything(_: torch.Tensor) -> bool:
    """A `Wanted` that is known by name, so that nobody asks it for each of 20,000 tensors; `nothing` is another."""
    return True


def nothing(_: torch.Tensor) -> bool:
    return False


class StagedFile(ABC):
    """A file of this rank, whether it writes all of it, a share, or nothing; used for one save at a time."""

    def __init__(self) -> None:
        self._signature: list[tuple[str, tuple[int, ...]]] | None = None
        self._layout = ArchiveLayout((), ())
        self._share = Share(0, 0, tail=True, whole=True)
        self._file: FilePlan | None = None
        self._crcs: list[int | None] = []
        self._noted: list[int] | None = None
        self._index: IndexText | None = None
        self._kinds: list[tuple[str, int, str]] = []
        """Of each box its tensor, its record, and the beginning of its digest."""

    @property
    def name(self) -> str:
        return self._file.name if self._file is not None else ""

    @property
    def is_shared(self) -> bool:
        return self._file is not None and self._file.sharers > 1

    @property
    def is_led(self) -> bool:
        """Whether this rank writes its end, and others write of it, too."""
        return self._share.tail and not self._share.whole

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's share: tensors with their headers; the tail comes on top."""
        return self._share.end - self._share.start

    def held(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What every rank that plans this file must hold alike: the layout, the tensors, the Python values."""
        assert self._file is not None
        own = {name: value_digest(values[name]) for name in self._file.values}
        return {f"the layout of {self.name}": value_digest(self._signature), **self.digests(), **own}

    def lay_out(self, file: FilePlan, *, least_share: int | None) -> bool:
        """Begin a save; whether the layout or the share is another than that of the last one. Touches no tensor."""
        is_again = self._file is not None and file.boxes is self._file.boxes  # of a plan that was made again
        signature = self._signature if is_again else [(record.dtype, record.shape) for record in file.records]
        known = signature == self._signature
        if not known:
            self._layout = lay_out([record.nbytes for record in file.records])
        if not is_again:
            self._index, self._kinds = None, []
        self._file = file
        self._crcs = [None] * len(file.records)
        self._noted = None
        who: dict[str, Any] = {"home": file.home, "sharers": file.sharers, "place": file.place}
        share = share_out(self._layout.tail, least=least_share, **who)
        known = known and share == self._share
        self._signature, self._share = signature, share
        return not known

    def notes(self) -> Iterable[Callable[[], None]]:
        """Jobs that sum up every tensor as it is now, to be compared with what is written."""
        assert self._file is not None
        noted = self._noted = [0] * len(self._file.records)
        for number, record in enumerate(self._file.records):
            yield _note_job(noted, number, record.tensor)

    @abstractmethod
    def jobs(self, wanted: Wanted) -> Iterable[Callable[[], None]]:
        """What is to be done now for the wanted tensors."""

    @property
    def image(self) -> Image | None:
        """The memory that it is copied to, if it is copied."""
        return None

    def transfers(self, wanted: Wanted) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Instead of `jobs`, where the image is page-locked and the wanted tensors lie on devices: (target, source) of
        the copies that are to be queued."""
        raise RuntimeError("there is no image to copy to")

    def nbytes_of(self, wanted: Wanted) -> int:
        """Bytes of the records for which it holds."""
        return sum(record.nbytes for record in self._file.records if wanted(record.tensor)) if self._file else 0

    @abstractmethod
    def seal(self, rank: int, *, threads: int) -> Sealed | None:
        """What this rank writes of it, complete; None if others write all of it. After all jobs."""

    def digests(self) -> dict[str, str]:
        """By tensor what is stored of it, as text, to be compared with other ranks' copies. After `seal`, before
        `let_go`. Made when it is asked for: a rank without peers compares nothing, and 20,000 take 15 ms."""
        assert self._file is not None
        if not self._kinds:
            records = self._file.records
            kinds = [(stored.name, stored.record, records[stored.record]) for stored in self._file.boxes]
            self._kinds = [(name, number, _kind(record.dtype, record.shape)) for name, number, record in kinds]
        return {name: f"{kind}{self._crcs[number] or 0:08x}" for name, number, kind in self._kinds}

    def changed(self) -> list[str]:
        """After `seal`: the tensors that are not what they were when they were noted."""
        if self._noted is None:
            return []
        return self._names_of(
            {i for i, (was, crc) in enumerate(zip(self._noted, self._crcs, strict=True)) if was != crc}
        )

    def let_go(self) -> None:
        """Nothing of a state is held from one save to the next."""
        if self._file is not None:
            self._file = replace(self._file, records=())

    def _names_of(self, numbers: set[int]) -> list[str]:
        assert self._file is not None
        return [stored.name for stored in self._file.boxes if stored.record in numbers]

    def _sum_job(self, number: int, tensor: torch.Tensor) -> Callable[[], None]:
        def sum_up() -> None:
            self._crcs[number] = crc_of(tensor)

        return sum_up

    def _tail(self, crcs: Sequence[int]) -> Tail:
        assert self._file is not None
        if self._index is None:
            records = [
                StoredRecord(record.dtype, record.shape, slot.data, slot.nbytes, 0)
                for record, slot in zip(self._file.records, self._layout.slots, strict=True)
            ]
            self._index = index_text(records, self._file.boxes)
        return make_tail(self._layout, crcs, self._index.with_crcs(crcs), self._file.tree.encode())


def changed_error(names: Iterable[str]) -> CheckpointSaveError:
    """What fails a save whose state has changed under it."""
    listed = list(dict.fromkeys(names))
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return CheckpointSaveError(
        f"tensors have changed between `save` and their writing: {', '.join(listed[:10])}{more}. Something other than "
        "a step of an optimizer in the state changes them: put it under `guard()` of the manager, or save with "
        'staging="blocking"'
    )


def digest_of(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> str:
    """Of a tensor, as text, to be compared with other ranks' copies."""
    return _kind(str(dtype).removeprefix("torch."), shape) + to_hex(crc)


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def crc_of(tensor: torch.Tensor) -> int:
    """Of its elements in row-major order, where they are: through memory of a fixed size at most."""
    crc = 0
    for piece in contents_of(tensor, 0, tensor.numel() * tensor.element_size()):
        crc = crc32(piece, crc)
    return crc


def _note_job(noted: list[int], number: int, tensor: torch.Tensor) -> Callable[[], None]:
    def note() -> None:
        noted[number] = crc_of(tensor)

    return note
