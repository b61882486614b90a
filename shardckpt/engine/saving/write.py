"""Write: put finished images into storage, and say what was put. The receipt is all that the commit believes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from shardckpt.engine.progress import Phase, Progress
from shardckpt.engine.writing.blobs import Blobs
from shardckpt.format.record.files import FileEntry, decode_file, encode_file
from shardckpt.storage.base import PutPart, RenamingStorage, SharedPuts, Storage, UploadId
from shardckpt.storage.transfer.several import for_each


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A finished file image: `parts` one after the other are the bytes from `start` on of the file of `entry`."""

    entry: FileEntry
    parts: Iterable[memoryview]
    digests: Callable[[], Mapping[str, str]]
    """Gives for each tensor what is stored of it here, as text, to be compared with other ranks' copies; until the save
    lets go of the state."""
    start: int = 0
    whole: bool = True
    """Whether this rank writes all of it; else several ranks write ranges of it."""
    numbers: range = range(0)
    """Of the parts, where it is put as an upload that several ranks share."""
    digest: str = ""
    """Of the content of a file that is put only if no blob has that content."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def end(self) -> int:
        return self.entry.nbytes


@dataclass(frozen=True, slots=True)
class SealedRange:
    """This rank's range of a file whose tail, and so whose entry, is another's: bytes `start` to `end`."""

    name: str
    parts: Iterable[memoryview]
    start: int
    end: int
    numbers: range = range(0)


_PIECE = 32 << 20
"""Bytes between two looks at whether to stop; whole pages, and pieces of any storage."""

_FILES = 4
"""How many are put into an object store at the same time."""

Sealed: TypeAlias = SealedFile | SealedRange


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one rank has durably written, and what it holds; travels to rank 0 as JSON."""

    rank: int
    shard: int
    files: tuple[FileEntry, ...]
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By file: key to a digest of its content, of keys that other files of the kind may hold too."""
    alike: Mapping[str, str] = field(default_factory=dict)
    """By file: one digest over what this rank holds of the tensors that it took to be the same on all its peers."""
    table: str = ""
    """Digest of this rank's table; the table itself is sent only if rank 0 asks for it."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    wrote: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By file: which of its bytes (start, end) are this rank's work."""
    phases: tuple[Phase, ...] = ()
    """What this rank has done so far, and when."""
    parts: Mapping[str, Sequence[PutPart]] = field(default_factory=dict)
    """By file that several ranks put as one upload: what the storage has answered to this rank's parts."""

    def encode(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "shard": self.shard,
            "files": [encode_file(file) for file in self.files],
            "digests": {file: dict(keys) for file, keys in self.digests.items()},
            "alike": dict(self.alike),
            "table": self.table,
            "seconds": dict(self.seconds),
            "wrote": {file: list(extent) for file, extent in self.wrote.items()},
            "parts": {file: [[p.number, p.tag, p.nbytes] for p in parts] for file, parts in self.parts.items()},
            "phases": [[each.name, each.began, each.seconds, each.thread] for each in self.phases],
        }


def decode_receipt(content: Mapping[str, Any]) -> Receipt:
    files = tuple(decode_file(entry) for entry in content["files"])
    wrote = {file: (start, end) for file, (start, end) in content["wrote"].items()}
    phases = tuple(Phase(*each) for each in content["phases"])
    parts = {file: [PutPart(*part) for part in parts] for file, parts in content["parts"].items()}
    return Receipt(**{**content, "files": files, "wrote": wrote, "phases": phases, "parts": parts})


class _Pieces(Sequence[memoryview]):
    """Parts in pieces; before each of them a save that was asked to stop does."""

    def __init__(self, parts: Sequence[memoryview], progress: Progress) -> None:
        self._pieces = [part[at : at + _PIECE] for part in parts for at in range(0, len(part), _PIECE)]
        self._progress = progress

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: Any) -> Any:
        self._progress.check()
        return self._pieces[number]


Pace: TypeAlias = Callable[[Iterable[memoryview]], Iterable[memoryview]]
"""Gives the same bytes, each when it may go."""


def _at_once(parts: Iterable[memoryview]) -> Iterable[memoryview]:
    return parts


def _watched(parts: Iterable[memoryview], progress: Progress) -> Iterable[memoryview]:
    """Again a sequence, which can be put again, if `parts` is one."""
    if isinstance(parts, Sequence):
        return _Pieces(parts, progress)

    def watched() -> Iterator[memoryview]:
        for part in parts:
            progress.check()
            yield part

    return watched()


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """What one rank has put."""

    files: tuple[FileEntry, ...]
    """Those that it completes."""
    parts: Mapping[str, Sequence[PutPart]] = field(default_factory=dict)
    """Of uploads: see `Receipt.parts`."""
    reused_nbytes: int = 0
    """Of its files, the bytes that were there already, in blobs."""


def write_files(
    storage: Storage,
    prefix: str,
    sealed: Sequence[Sealed],
    progress: Progress,
    *,
    uploads: Mapping[str, UploadId],
    blobs: Blobs,
    pace: Pace = _at_once,
) -> OwnFiles:
    """Put what is this rank's of its files below `prefix`, durable when it returns, or when their upload is finished.

    Called on the save thread of every rank. `uploads`: those that are under way, by file that ranks put together.
    """
    parts: dict[str, Sequence[PutPart]] = {}
    shared: dict[str, tuple[FileEntry, bool]] = {}

    def write(file: Sealed) -> None:
        progress.check()
        key, content = f"{prefix}/{file.name}", _watched(pace(file.parts), progress)
        if isinstance(file, SealedFile) and file.digest:
            shared[file.name] = blobs.have(prefix, file.entry, file.digest, content, check=progress.check)
        elif isinstance(file, SealedFile) and file.whole:
            storage.put(key, content)
        elif isinstance(storage, RenamingStorage):
            storage.put_range(key, file.start, content)
        else:
            assert isinstance(storage, SharedPuts), "only then are files shared"
            put = partial(storage.put_parts, numbers=file.numbers, nbytes=file.end - file.start)
            parts[file.name] = put(key, uploads[file.name], content)
        progress.add(file.end - file.start)

    # A disk is busy with one file; an object store would idle at the end of each.
    for_each(sealed, write, threads=1 if isinstance(storage, RenamingStorage) else _FILES)
    entries = [file.entry for file in sealed if isinstance(file, SealedFile)]
    reused = sum(entry.nbytes for entry, was_put in shared.values() if not was_put)
    return OwnFiles(tuple(shared.get(entry.name, (entry, True))[0] for entry in entries), parts, reused)
