"""What a program did to a file system, in the order in which it did it: the input of every model of a power cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

ROOT = 0
"""The node of the folder that is watched."""

Change: TypeAlias = "tuple[int, str, int | None]"
"""In this folder (a node) this name now leads to this node, or to nothing."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Names that were made, moved or removed by one call, which the file system carries out as a whole."""

    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes that were written to a file, from byte `offset` on."""

    node: int
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Size:
    """A file was cut off or extended; with `grow` it is extended only (fallocate)."""

    node: int
    nbytes: int
    grow: bool = False


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync or fdatasync of a file or a folder has returned."""

    node: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Between two operations: what the program that is watched had been promised by then.

    From the first mark of a `version` on it may be there; from its acknowledgement on no older one may. A version is
    whatever the test tells contents apart by; None stands for "not there": deletions are begun and acknowledged, too.
    """

    step: int
    version: object
    acknowledged: bool = False


Operation: TypeAlias = Entries | Data | Size | Sync | Mark


@dataclass(slots=True)
class Recording:
    """All of it, with what was there before, which counts as durable."""

    operations: list[Operation] = field(default_factory=list)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    """By node: the names in it at the beginning."""
    contents: dict[int, bytes] = field(default_factory=dict)
    """By node: the content of files at the beginning."""
    is_folder: dict[int, bool] = field(default_factory=lambda: {ROOT: True})
    """Of every node that there ever was."""


Allowed: TypeAlias = Mapping[int, frozenset[object]]
"""By step: the versions of it that may be found; None among them if it may be missing."""


class Ledger:
    """What may be found after the marks that were told so far."""

    def __init__(self) -> None:
        self._versions: dict[int, list[object]] = {}
        self._acknowledged: dict[int, int] = {}
        self.allowed: Allowed = {}

    def tell(self, mark: Mark) -> None:
        """Ranks may tell the same: the first of them counts."""
        versions = self._versions.setdefault(mark.step, [None])
        oldest = self._acknowledged.get(mark.step, 0)
        if mark.version not in versions[oldest:]:
            versions.append(mark.version)
        if mark.acknowledged:
            self._acknowledged[mark.step] = oldest + versions[oldest:].index(mark.version)
        may_be = versions[self._acknowledged.get(mark.step, 0) :]
        self.allowed = {**self.allowed, mark.step: frozenset(may_be)}
