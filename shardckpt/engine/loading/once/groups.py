"""Which ranks need the same bytes, and who of them fetches which. Pure; the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardckpt.format.checksum import value_digest
from shardckpt.storage.base import Read

LEAST = 1 << 20
"""Bytes of a file that make it worth while to meet about it."""
BLOCK = 8 << 20
"""Bytes that one rank fetches and passes on at a time, about."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that read exactly the same of some files."""

    ranks: tuple[int, ...]
    keys: tuple[str, ...]


def by_key(reads: Sequence[Read]) -> dict[str, list[Read]]:
    """Of each object what is read of it, in the order of the object; only of those that are worth while."""
    found: dict[str, list[Read]] = {}
    for read in sorted(reads, key=lambda read: (read.key, read.offset, len(read.into))):
        found.setdefault(read.key, []).append(read)
    return {key: those for key, those in found.items() if sum(len(read.into) for read in those) >= LEAST}


def digests(reads: Mapping[str, Sequence[Read]]) -> dict[str, str]:
    """By object: what two ranks have alike exactly if they read the same of it."""
    return {key: value_digest([[read.offset, len(read.into)] for read in those]) for key, those in reads.items()}


def find_groups(said: Sequence[Mapping[str, str]]) -> list[Group]:
    """From the digests of all ranks. Each object that a rank reads is in one of its groups at most."""
    readers: dict[tuple[str, str], list[int]] = {}
    for rank, own in enumerate(said):
        for key, digest in own.items():
            readers.setdefault((key, digest), []).append(rank)
    keys: dict[tuple[int, ...], list[str]] = {}
    for (key, _), ranks in sorted(readers.items()):
        if len(ranks) > 1:
            keys.setdefault(tuple(ranks), []).append(key)
    return [Group(ranks, tuple(those)) for ranks, those in sorted(keys.items())]


def blocks(reads: Sequence[Read]) -> list[list[Read]]:
    """The reads in blocks of about `BLOCK` bytes; longer ones are cut."""
    found: list[list[Read]] = []
    room = 0
    for read in reads:
        start, nbytes = 0, len(read.into)
        while start < nbytes:
            if not room:
                found.append([])
                room = BLOCK
            size = min(room, nbytes - start)
            found[-1].append(Read(read.key, read.offset + start, read.into[start : start + size]))
            start, room = start + size, room - size
    return found
