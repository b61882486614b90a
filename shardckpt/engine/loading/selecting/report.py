"""What a load would do, as data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileReads:
    """What one rank would read of one file."""

    file: str
    ranges: int
    """Stretches of bytes; one for each tensor, or for each of its rows that lie apart."""
    nbytes: int
    """Of tensors."""


@dataclass(frozen=True, slots=True)
class RankReads:
    """What one rank would read."""

    rank: int
    files: tuple[FileReads, ...] = ()
    index_nbytes: int = 0
    """Of the indexes and nestings of files that it opens."""

    @property
    def nbytes(self) -> int:
        """Of tensors."""
        return sum(file.nbytes for file in self.files)

    @property
    def ranges(self) -> int:
        return sum(file.ranges for file in self.files)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What `load` would do with a step; nothing was read for it but the record. The same on all ranks.

    Not counted: headers and padding of the files, a few kilobytes each, which are read to be checked. From an object
    store what several ranks read alike is fetched by one of them.
    """

    step: int
    url: str
    """Of the step, without credentials."""
    stored_nbytes: int
    """Of all its files."""
    ranks: tuple[RankReads, ...]
    """What each rank of the job would read."""
    changed: tuple[str, ...]
    """Keys that would be loaded into the state of some rank; a part that loads itself stands for all its keys."""
    left: Mapping[str, str]
    """Keys that stay as they are on some rank, although other keys of the state are loaded -> why."""
    dropped: tuple[str, ...]
    """Keys of the checkpoint that no rank would take."""
    problems: tuple[str, ...]
    """Every reason for which `load` would raise `CheckpointMismatchError`."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that all ranks together would read."""
        return sum(rank.nbytes for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return not self.problems
