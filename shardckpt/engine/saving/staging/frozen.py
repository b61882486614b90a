"""A file of tensors that are said not to change: never copied, summed up where they lie, and put only if it is new.

All of it happens on the save thread, so training waits for nothing. What it costs there is one pass over the tensors,
for the CRC-32 of each and a SHA-256, in the stager's threads. 2026-11-26, 2 cores of an Intel Xeon that has SHA
instructions: a whole save of 0.54 GB of which nothing has changed took 0.37 s/GB (0.37-0.39, 7 saves).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from shardckpt.engine.consolidated.fragments import contents_of
from shardckpt.engine.saving.staging.file import Wanted
from shardckpt.engine.saving.staging.windowed import WindowedFile
from shardckpt.engine.saving.write import Sealed, SealedFile
from shardckpt.format.archive import Tail
from shardckpt.format.checksum import crc32
from shardckpt.storage.transfer.several import for_each

_PIECE = 1 << 20
"""Bytes that both sums take while they are in the processor's cache."""


class FrozenFile(WindowedFile):
    """Its digest is over the SHA-256 of each tensor's bytes and the end of the file, which has their CRCs, names,
    shapes and places: the rest of the file follows from these (see `format.archive`).

    So whatever else changes a tensor while it is summed up: where the digest is that of a blob, the CRCs, and with them
    the entry in the record, are those of the blob; where it is not, the file is put, and a tensor whose CRC is then no
    longer the one it had fails the save.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: list[bytes] = []
        self._digest = ""

    def jobs(self, wanted: Wanted) -> Iterable[Callable[[], None]]:
        """Nothing that training would wait for."""
        return ()

    def seal(self, rank: int, *, threads: int) -> Sealed | None:
        """None if another rank puts it; this one has summed up what it holds all the same, to be compared."""
        assert self._file is not None
        self._sums = [b""] * len(self._file.records)
        for_each(range(len(self._sums)), self._sum_both, threads=threads)
        sealed = super().seal(rank, threads=threads)
        if not isinstance(sealed, SealedFile):
            return sealed
        return replace(sealed, digest=self._digest)

    def _tail(self, crcs: Sequence[int]) -> Tail:
        tail = super()._tail(crcs)
        self._digest = hashlib.sha256(b"".join([*self._sums, tail.content])).hexdigest()
        return tail

    def _sum_both(self, number: int) -> None:
        assert self._file is not None
        record, crc, digest = self._file.records[number], 0, hashlib.sha256()
        for content in contents_of(record.tensor, 0, record.nbytes):
            for at in range(0, len(content), _PIECE):
                piece = content[at : at + _PIECE]
                crc = crc32(piece, crc)
                digest.update(piece)
        self._crcs[number], self._sums[number] = crc, digest.digest()
