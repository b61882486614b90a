"""Was what is stored there what we sent?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from shardckpt.storage.base import Buffer, Read, Storage


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Length and CRC-32 of a content."""

    nbytes: int = 0
    crc32: int = 0

    def extended(self, part: Buffer) -> Fingerprint:
        """The fingerprint of this content followed by `part`."""
        return Fingerprint(self.nbytes + memoryview(part).nbytes, zlib.crc32(part, self.crc32))


def fingerprint(parts: Sequence[Buffer]) -> Fingerprint:
    """The fingerprint of what a put of these parts would store."""
    whole = Fingerprint()
    for part in parts:
        whole = whole.extended(part)
    return whole


def stores(storage: Storage, key: str, content: Fingerprint) -> bool:
    """Whether `key` holds this content, found by reading it back in pieces of 8 MiB.

    This is how a put whose answer was lost recognises itself: its repetition is refused because the key is there,
    and the key is there because the first try arrived. A content that differs is another writer's. A content that is
    equal cannot be told apart from ours, and need not be: what the caller wanted stored is stored.
    """
    try:
        if storage.size(key) != content.nbytes:
            return False
        window, found = memoryview(bytearray(8 << 20)), Fingerprint()
        while found.nbytes < content.nbytes:
            piece = window[: min(len(window), content.nbytes - found.nbytes)]
            storage.read_into([Read(key, found.nbytes, piece)])
            found = found.extended(piece)
    except (FileNotFoundError, EOFError):
        return False
    return found == content
