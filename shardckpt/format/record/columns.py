"""The files of a record of many ranks, in columns: no object for each, and a few digits in place of a line. No torch.

What ranks call alike but for a number (`rank_0.pt`, `rank_1.pt`, ...) is a family: the name is said once, and each
thing said of its files is one column of numbers. A `FileEntry` is made when somebody asks for it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from shardckpt.format.record.files import Extent, FileEntry

MANY = 64
"""Files of one family that are worth columns. Below that each file is a line that a person can read."""

KINDS = ("model", "replicated", "rank")
"""What a family may be of. Of other kinds there are rules for each file, or few files."""

_NUMBERED = re.compile(r"(.*[^0-9]|)(0|[1-9][0-9]{0,8})([^0-9/]*)", re.DOTALL)

Numbers = Sequence[int]
Extents = tuple[Numbers, Numbers, Numbers]
"""Byte offsets, bytes, CRCs."""


@dataclass(frozen=True)
class Family:
    """Files that are called alike; every column has a number for each file."""

    kind: str
    before: str
    after: str
    numbers: Numbers
    writers: Numbers
    nbytes: Numbers
    crcs: Numbers
    indexes: Extents | None
    trees: Extents | None

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, place: int) -> str:
        return f"{self.before}{self.numbers[place]}{self.after}"

    def entry(self, place: int) -> FileEntry:
        index, tree = _extent(self.indexes, place), _extent(self.trees, place)
        row = self.nbytes[place], self.crcs[place], self.kind, self.writers[place]
        return FileEntry(self.name(place), *row, index, tree)

    @cached_property
    def places(self) -> Mapping[int, int]:
        return {number: place for place, number in enumerate(self.numbers)}


class FileColumns(Sequence[FileEntry]):
    """The files of a record: first those that are told one by one, then families."""

    def __init__(self, loose: Sequence[FileEntry], families: Sequence[Family]) -> None:
        self.loose = tuple(loose)
        self.families = tuple(families)
        self._size = len(self.loose) + sum(map(len, self.families))

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> FileEntry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[FileEntry, ...]: ...
    def __getitem__(self, place: int | slice) -> FileEntry | tuple[FileEntry, ...]:
        if isinstance(place, slice):
            return tuple(self._at(number) for number in range(*place.indices(self._size)))
        return self._at(operator.index(place) + (self._size if place < 0 else 0))

    def __iter__(self) -> Iterator[FileEntry]:
        yield from self.loose
        for family in self.families:
            yield from map(family.entry, range(len(family)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (FileColumns, tuple)):
            return NotImplemented
        return len(self) == len(other) and sorted(self, key=_by_name) == sorted(other, key=_by_name)

    def __hash__(self) -> int:
        return hash(len(self))

    def __repr__(self) -> str:
        return f"FileColumns({len(self.loose)} and {[len(family) for family in self.families]} files)"

    def named(self, name: str) -> FileEntry | None:
        """The file of that name; None if there is none."""
        return self.in_family(name) or self._by_name.get(name)

    def in_family(self, name: str) -> FileEntry | None:
        """The file of that name; None if there is none, or if it is told by itself. However many families there are."""
        parsed = parse_name(name)
        family = self._alike.get((parsed[0], parsed[2])) if parsed is not None else None
        place = family.places.get(parsed[1]) if family is not None and parsed is not None else None
        return None if family is None or place is None else family.entry(place)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.loose) + sum(sum(family.nbytes) for family in self.families)

    @cached_property
    def _by_name(self) -> dict[str, FileEntry]:
        return {file.name: file for file in self.loose}

    @cached_property
    def _alike(self) -> dict[tuple[str, str], Family]:
        return {(family.before, family.after): family for family in self.families}

    def _at(self, place: int) -> FileEntry:
        if not 0 <= place < self._size:
            raise IndexError(f"file {place} of {self._size}")
        if place < len(self.loose):
            return self.loose[place]
        place -= len(self.loose)
        for family in self.families:
            if place < len(family):
                return family.entry(place)
            place -= len(family)
        raise IndexError(place)


class FilesByName:
    """The files of a record, however it has them, by their names."""

    def __init__(self, files: Sequence[FileEntry]) -> None:
        self._columns = files if isinstance(files, FileColumns) else FileColumns(files, ())

    def get(self, name: str) -> FileEntry | None:
        """The file of that name; None if there is none."""
        return self._columns.named(name)

    def written_by(self, rank: int) -> list[str]:
        """The names of the files that this rank wrote, in order."""
        names = [file.name for file in self._columns.loose if file.writer == rank]
        for family in self._columns.families:
            names += [family.name(place) for place, writer in enumerate(family.writers) if writer == rank]
        return sorted(names)

    def every(self, step: int, *, start: int) -> list[str]:
        """The names of every n-th file: the same n lists for all who hold the same record."""
        return sorted(file.name for file in self._columns[start::step])

    @property
    def last_writer(self) -> int:
        """The highest number of a rank that wrote any of them."""
        alone = (file.writer for file in self._columns.loose)
        return max([0, *alone, *(max(family.writers) for family in self._columns.families)])

    def begins_with(self, folder: str) -> bool:
        """Whether the name of any of them begins so."""
        columns = self._columns
        names = [*(file.name for file in columns.loose), *(family.name(0) for family in columns.families)]
        return any(name.startswith(folder) for name in names)


def parse_name(name: str) -> tuple[str, int, str] | None:
    """What comes before the last number of a file's name, that number, and what comes after; None if it has none."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def loose(files: Sequence[FileEntry]) -> Sequence[FileEntry]:
    """Those that are in no family: all that are of a kind of their own, or blobs, and perhaps others."""
    return files.loose if isinstance(files, FileColumns) else files


def in_columns(files: Sequence[FileEntry]) -> FileColumns:
    """The files, those of large families in columns."""
    if isinstance(files, FileColumns):
        return files
    alike: dict[tuple[Any, ...], list[tuple[int, FileEntry]]] = {}
    for file in files:
        parsed = parse_name(file.name)
        if parsed is not None and file.kind in KINDS and not file.blob:
            key = (parsed[0], parsed[2], file.kind, file.index is None, file.tree is None)
            alike.setdefault(key, []).append((parsed[1], file))
    families: dict[tuple[str, str], Family] = {}
    taken: set[str] = set()
    for (before, after, kind, *_), numbered in alike.items():
        if len(numbered) >= MANY and (before, after) not in families:
            numbers, members = zip(*sorted(numbered, key=lambda pair: pair[0]), strict=True)
            families[before, after] = _family(kind, (before, after), numbers, members)
            taken.update(file.name for file in members)
    return FileColumns([file for file in files if file.name not in taken], tuple(families.values()))


def _family(kind: str, name: tuple[str, str], numbers: Numbers, members: Sequence[FileEntry]) -> Family:
    writers, nbytes, crcs = zip(*((file.writer, file.nbytes, file.crc) for file in members), strict=True)
    return Family(kind, *name, numbers, writers, nbytes, crcs, _extents(members, "index"), _extents(members, "tree"))


def _extents(members: Sequence[FileEntry], part: str) -> Extents | None:
    extents = [getattr(file, part) for file in members]
    if extents[0] is None:
        return None
    at, nbytes, crc = zip(*extents, strict=True)
    return at, nbytes, crc


def _extent(columns: Extents | None, place: int) -> Extent | None:
    return None if columns is None else (columns[0][place], columns[1][place], columns[2][place])


def _by_name(file: FileEntry) -> str:
    return file.name
