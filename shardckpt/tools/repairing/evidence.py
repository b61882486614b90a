"""What the files of a step without a usable record say of themselves: all are read and checked, or it is refused."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.layout import CARBON_COPY, MANIFEST, METADATA, METRICS, SCORE, wanted_file
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Storage
from shardckpt.tools.checking.archives import Window, check_archive
from shardckpt.tools.checking.own import Own, read_own
from shardckpt.tools.checking.summing import Stretch, sums
from shardckpt.tools.contents import files_below
from shardckpt.tools.repairing.content import Content, content_of
from shardckpt.tools.report import Problem

_OURS = re.compile(r"(?P<kind>model|replicated|metadata)(\.(0|[1-9][0-9]*))?\.pt|rank_(0|[1-9][0-9]*)\.pt")
_WANTED = wanted_file("")
_KEPT_RECORD = re.compile(re.escape(MANIFEST) + r"\.damaged-[0-9a-z]+")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The files of one folder. Names are relative to it."""

    folder: str
    owns: Mapping[str, Own]
    """Archives of ours."""
    contents: Mapping[str, Content]
    """Of the same, but for the user's own metadata."""
    copies: Mapping[str, tuple[int, int]]
    """Files that are no archives of ours: bytes and CRC as they are now, which nothing can be held against."""
    wanted: Mapping[str, str] = field(default_factory=dict)
    """Of files that other steps may have as well: name to digest, where the step says so itself."""


def kind_of(name: str) -> str:
    """A `Home`, or METADATA, by the name of an archive of ours."""
    match = _OURS.fullmatch(name)
    assert match is not None
    return METADATA if match["kind"] == "metadata" else match["kind"] or "rank"


def entries_of(evidence: Evidence, kinds: Mapping[str, str]) -> tuple[FileEntry, ...]:
    """The files as a record names them; `kinds`: of files of which their names do not tell."""
    entries = [
        FileEntry(name, own.nbytes, own.crc, kinds.get(name) or kind_of(name), _writer(name), own.index_at, own.tree_at)
        for name, own in evidence.owns.items()
    ]
    entries += [FileEntry(name, nbytes, crc, CARBON_COPY, 0) for name, (nbytes, crc) in evidence.copies.items()]
    return tuple(sorted(entries, key=lambda file: file.name))


def _writer(name: str) -> int:
    return int(name[5:-3]) if kind_of(name) == "rank" else 0


def gather(storage: Storage, folder: str, *, step: int) -> Evidence:
    """Read and check all of them. `CheckpointDamagedError` names every file that cannot be used, and why."""
    names = [name for name in files_below(storage, folder) if not _is_beside(name)]
    wanted = {name: storage.read(f"{folder}/{name}").decode("ascii", "replace") for name in names if _says(name)}
    names = [name for name in names if name not in wanted]
    problems, owns, copies = list[Problem](), dict[str, Own](), list[tuple[str, int]]()
    for name in names:
        key = f"{folder}/{name}"
        nbytes = storage.size(key)
        if not _OURS.fullmatch(name):
            copies.append((name, nbytes))
        elif found := _problems(storage, key, name, nbytes):
            problems += found
        else:
            with zipfile.ZipFile(io.BufferedReader(Window(storage, key, nbytes))) as archive:
                owns[name] = read_own(archive, nbytes)
    if problems or not owns:
        what = "; ".join(map(str, problems)) or "it has no file of a checkpoint"
        raise CheckpointDamagedError(f"no record can be made for {storage.url}/{folder}: {what}", step=step)
    said = {name.removesuffix(_WANTED): digest for name, digest in wanted.items()}
    return Evidence(folder, owns, _contents(folder, owns, step), _summed(storage, folder, copies), said)


def _contents(folder: str, owns: Mapping[str, Own], step: int) -> dict[str, Content]:
    contents = {}
    for name, own in owns.items():
        try:
            if kind_of(name) != METADATA:
                contents[name] = content_of(own.index, own.tree)
        except ValueError as error:
            raise CheckpointDamagedError(f"no record can be made for {folder}: {name}: {error}", step=step) from error
    return contents


def _problems(storage: Storage, key: str, name: str, nbytes: int) -> Sequence[Problem]:
    archive = check_archive(storage, key, name, nbytes=nbytes)
    if not archive.problems and archive.own is None:
        return (Problem(name, archive.note or "it is no archive of ours: it has no index"),)
    return archive.problems


def _is_beside(name: str) -> bool:
    """What lies in a step's folder and is not part of it."""
    return name in (MANIFEST, SCORE, METRICS) or _KEPT_RECORD.fullmatch(name) is not None


def _says(name: str) -> bool:
    """Whether it says which content of a file that steps share its step has."""
    return name.endswith(_WANTED) and "/" not in name


def _summed(storage: Storage, folder: str, copies: list[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    found = sums(storage, [Stretch(f"{folder}/{name}", 0, nbytes) for name, nbytes in copies])
    summed = {}
    for (name, nbytes), crc in zip(copies, found, strict=True):
        if isinstance(crc, Exception):
            raise crc
        summed[name] = (nbytes, crc)
    return summed
