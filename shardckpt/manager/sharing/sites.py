"""From where a rank sees the root of a run: ranks of one site see the same one without asking."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardckpt.gang.base import Json
from shardckpt.storage.base import RenamingStorage, Storage


@dataclass(frozen=True, slots=True)
class Site:
    """What a rank tells of itself."""

    place: str
    """Equal where it is certain that the root is the same."""
    node: str
    """For people."""

    def to_json(self) -> Json:
        return [self.place, self.node]

    @classmethod
    def from_json(cls, value: Any) -> Site:
        return cls(*value)


def site_of(storage: Storage) -> Site:
    """The site of this process.

    A file system is the same for processes of one machine that see the same mounts and were given the same path; what
    lies in memory for one process; an object store for all who were given the same URL.
    """
    while (inner := getattr(storage, "inner", None)) is not None:
        storage = inner
    place, node = storage.url, socket.gethostname()
    if isinstance(storage, RenamingStorage):
        place = f"{node} {_mounts()} {place}"
    elif place.startswith("memory://"):
        place = f"{node} {_mounts()} {os.getpid()} {place}"
    return Site(place, node)


def _mounts() -> str:
    """This boot of the machine, and which mounts this process sees; "" where the system does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/thread-self/ns/mnt')}"
    return ""


def far_sites(sites: Sequence[Site]) -> dict[int, list[int]]:
    """The ranks of each site that is not rank 0's, by the first of them; `sites` by rank."""
    by_place: dict[str, list[int]] = {}
    for rank, site in enumerate(sites):
        by_place.setdefault(site.place, []).append(rank)
    return {ranks[0]: ranks for ranks in by_place.values() if ranks[0] != 0}
