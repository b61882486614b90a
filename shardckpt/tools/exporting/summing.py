"""CRCs of whole tensors of a source: what it knows of them, and what must be read to know them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

from shardckpt.engine.loading.integrity import sum_among_zeros, zero_crc
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.checksum import crc32
from shardckpt.tools.moving.seam import SourceAround, TensorFacts, TensorSource, Window
from shardckpt.tools.moving.writing.stream import Segment, streamed

_AT_ONCE = 32 << 20
_ALIGNED = 16
"""Bytes of the widest element: windows begin at such places, so that none cuts an element."""

Extent = tuple[str, int, int]
"""A tensor, and the first and last of the bytes of it that are meant."""


def known_crc(source: TensorSource, name: str) -> int | None:
    """The CRC of a whole tensor if the source can tell it without reading it; what it gives it must then check."""
    tell = getattr(source, "crc", None)
    crc: int | None = tell(name) if tell is not None else None
    return crc


def unsummed(source: TensorSource, names: Iterable[str]) -> dict[str, TensorFacts]:
    """Those that must be read for their CRCs."""
    facts = source.tensors
    return {name: facts[name] for name in names if known_crc(source, name) is None}


class SummedSource(SourceAround):
    """As `source`; what is read of some of its tensors is summed up, each part at its place among zeros.

    The sums of parts of a tensor that several ranks read, xored, are that of the tensor (see `loading.integrity`).
    """

    def __init__(self, source: TensorSource, names: Collection[str]) -> None:
        super().__init__(source)
        self._names = frozenset(names)
        self._lock = threading.Lock()
        self.sums: dict[str, int] = {}

    def read(self, windows: Sequence[Window]) -> None:
        self._source.read(windows)
        for window in windows:
            if window.name in self._names:
                nbytes = self.tensors[window.name].nbytes
                total = sum_among_zeros(nbytes, [(window.start, len(window.into), crc32(window.into))])
                with self._lock:
                    self.sums[window.name] = self.sums.get(window.name, 0) ^ total

    def check(self, before: Mapping[str, int]) -> None:
        """`CheckpointDamagedError` if these parts had other sums when they were read before."""
        for name, total in before.items():
            if self.sums.get(name, 0) != total:
                raise CheckpointDamagedError(
                    f"{name} was read twice, and was not the same: somebody changes it, or the storage is not sound"
                )


def sums_of(source: TensorSource, extents: Iterable[Extent], *, budget_nbytes: int) -> dict[str, int]:
    """The sums of these parts of tensors, which are read for it, some megabytes at once."""
    parts = list(extents)
    summed = SummedSource(source, {name for name, _, _ in parts})
    memory = memoryview(bytearray(min(budget_nbytes // 2, _AT_ONCE) // _ALIGNED * _ALIGNED if parts else 0))
    for batch in _batches(parts, memory):
        summed.read(batch)
    return {name: summed.sums.get(name, 0) for name, _, _ in parts}


def crcs_of(source: TensorSource, tensors: Mapping[str, TensorFacts], sums: Mapping[str, int]) -> dict[str, int]:
    """The CRCs of whole tensors: by these sums, or as the source knows them."""
    return {
        name: sums[name] ^ zero_crc(facts.nbytes) if name in sums else known_crc(source, name) or 0
        for name, facts in tensors.items()
    }


def checked(
    source: TensorSource,
    segments: Sequence[Segment],
    before: Mapping[str, int],
    *,
    budget_nbytes: int,
    stretch: tuple[int, int] | None = None,
) -> Generator[memoryview, None, None]:
    """As `streamed`. At the end `CheckpointDamagedError` if some of it, read `before`, had other sums then."""
    summed = SummedSource(source, before)
    with closing(streamed(summed, segments, budget_nbytes=budget_nbytes, stretch=stretch)) as pieces:
        yield from pieces
    summed.check(before)


def _batches(extents: Iterable[Extent], memory: memoryview) -> Iterator[list[Window]]:
    """All these bytes in windows that fill the memory, again and again."""
    batch: list[Window] = []
    used = 0
    for name, start, stop in extents:
        while start < stop:
            nbytes = min(stop - start, len(memory) - used)
            batch.append(Window(name, start, memory[used : used + nbytes]))
            start, used = start + nbytes, used + nbytes
            if used == len(memory):
                yield batch
                batch, used = [], 0
        used += -used % _ALIGNED
        if used == len(memory):
            yield batch
            batch, used = [], 0
    if batch:
        yield batch
