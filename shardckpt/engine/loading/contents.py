"""What the files of a step say of themselves: sizes, indexes, trees, and the bytes around the tensors.

Nothing here is believed before it has been checked: size, then digest, then parse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import ArchiveIndex, StoredBox, StoredRecord, decode_index
from shardckpt.format.manifest import FileEntry, Manifest
from shardckpt.format.record.columns import FilesByName, loose
from shardckpt.format.record.files import keys_in
from shardckpt.format.tree import decode_tree, map_leaves
from shardckpt.state import Path, join_path
from shardckpt.storage.base import Read, RenamingStorage, Storage
from shardckpt.storage.transfer.several import for_each

_SMALL = 1 << 20
"""Bytes of an index or a tree that are read without having looked whether the file has them."""
_AT_ONCE = 8
"""Files of an object store that are looked at together: each is a request."""


class Contents:
    """The files of one committed step, as one rank reads them."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._step = manifest.step
        self.key_of = keys_in(folder, loose(manifest.files))
        """From the name of a file in the record to its key in the storage."""
        self._files = FilesByName(manifest.files)
        self._indexes: dict[str, ArchiveIndex] = {}
        self._by_name: dict[str, Mapping[str, list[StoredBox]]] = {}
        self._trees: dict[str, Any] = {}
        self._frames: dict[str, list[tuple[int, bytearray]]] = {}

    def assigned(self, rank: int, world_size: int) -> list[str]:
        """The files that this rank looks after: it checks their sizes, and the bytes that belong to no tensor."""
        if self._files.last_writer < world_size:  # whoever wrote it most likely reads it now
            return self._files.written_by(rank)
        return self._files.every(world_size, start=rank)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raise `CheckpointDamagedError` for a file that is missing or of another size."""
        threads = 1 if isinstance(self._storage, RenamingStorage) else _AT_ONCE
        for_each(names, self._check_size, threads=threads)

    def _check_size(self, name: str) -> None:
        expected = self._entry(name).nbytes
        try:
            nbytes = self._storage.size(self.key_of(name))
        except FileNotFoundError as error:
            raise self._damaged(name, "is missing") from error
        if nbytes != expected:
            raise self._damaged(name, f"has {nbytes} bytes, but {expected} were written")

    def open(self, names: Iterable[str], trees: Iterable[str]) -> None:
        """Read, check and parse the indexes and trees of these files, all of them at once."""
        wanted = [(name, "index") for name in sorted(set(names))] + [(name, "tree") for name in sorted(set(trees))]
        # A record may claim any size: before much memory is taken for it, the file must be as large as it says.
        extents = [(name, getattr(self._entry(name), what)) for name, what in wanted]
        self.check_sizes({name for name, extent in extents if extent is not None and extent[1] > _SMALL})
        buffers: dict[tuple[str, str], tuple[bytearray, int]] = {}
        reads = []
        for name, what in wanted:
            extent = getattr(self._entry(name), what)
            if extent is not None:
                at, nbytes, crc = extent
                buffers[name, what] = (bytearray(nbytes), crc)
                reads.append(Read(self.key_of(name), at, memoryview(buffers[name, what][0])))
        self._storage.read_into(reads)
        for (name, what), (content, crc) in buffers.items():
            self._parse(name, what, bytes(content), crc)

    def boxes(self, name: str) -> Mapping[str, list[StoredBox]]:
        """The boxes in a file, by tensor."""
        if name not in self._by_name:
            self._by_name[name] = self._index(name).by_name()
        return self._by_name[name]

    def record(self, name: str, stored: StoredBox) -> StoredRecord:
        return self._index(name).records[stored.record]

    def frame_reads(self, names: Iterable[str]) -> list[Read]:
        """Reads of all bytes of these files that belong to no tensor: headers, padding, index, tree, directory."""
        reads = []
        for name in names:
            entry, position = self._entry(name), 0
            records = sorted(self._indexes[name].records, key=lambda r: r.at) if name in self._indexes else []
            gaps: list[tuple[int, bytearray]] = []
            for start, end in [*((r.at, r.at + r.nbytes) for r in records), (entry.nbytes, entry.nbytes)]:
                if start < position:
                    raise self._damaged(name, "has tensors that overlap")
                gaps.append((position, bytearray(start - position)))
                position = end
            self._frames[name] = gaps
            reads += [Read(self.key_of(name), at, memoryview(gap)) for at, gap in gaps if gap]
        return reads

    def damaged_frames(self, names: Iterable[str]) -> list[str]:
        """The files whose digest does not follow from these bytes and the CRCs of their tensors."""
        return [name for name in names if self._file_crc(name) != self._entry(name).crc]

    def leaves(self, names: Iterable[str]) -> dict[str, tuple[Path, Any]]:
        """All leaves of the trees of these files, by flat name; the first file that has one gives it."""
        found: dict[str, tuple[Path, Any]] = {}
        for name in names:
            map_leaves(self._trees[name], lambda path, leaf: found.setdefault(join_path(path), (path, leaf)))
        return found

    def path_of(self, names: Iterable[str], key: str) -> Path:
        """The path that has this flat name in the trees of these files; if there is none, one that leads nowhere."""
        paths = (_find(self._trees[name], key) for name in names)
        return next((path for path in paths if path is not None), (key,))

    def subtree(self, names: Sequence[str], path: Path) -> Any:
        """What the trees of these files together hold below a path."""
        merged: Any = None
        for name in names:
            node = self._trees[name]
            for key in path:
                node = node.get(key) if isinstance(node, dict) else None
                if node is None:
                    break
            if merged is None or node is None:
                merged = node if merged is None else merged
            else:
                merged = merge(merged, node)
        return merged

    def _file_crc(self, name: str) -> int:
        records = sorted(self._indexes[name].records, key=lambda r: r.at) if name in self._indexes else []
        gaps = [(crc32(gap), len(gap)) for _, gap in self._frames[name]]
        tensors = [(record.crc, record.nbytes) for record in records]
        between = [piece for pair in zip(gaps, tensors, strict=False) for piece in pair]
        return combine([*between, gaps[-1]])[0]

    def _parse(self, name: str, what: str, content: bytes, crc: int) -> None:
        if crc32(content) != crc:
            raise self._damaged(name, f"has a damaged {what}")
        try:
            if what == "index":
                self._indexes[name] = decode_index(content, self._entry(name).nbytes)
            else:
                self._trees[name] = decode_tree(content)
        except ValueError as error:
            raise self._damaged(name, f"has an unusable {what}: {error}") from error

    def _index(self, name: str) -> ArchiveIndex:
        try:
            return self._indexes[name]
        except KeyError:
            raise self._damaged(name, "has no index") from None

    def _entry(self, name: str) -> FileEntry:
        entry = self._files.get(name)
        if entry is None:
            raise self._damaged(name, "is needed, but the record does not name it")
        return entry

    def _damaged(self, name: str, problem: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(
            f"step {self._step} at {self._storage.url} is damaged: {self.key_of(name)} {problem}", step=self._step
        )


def _find(tree: Any, key: str) -> Path | None:
    """The keys that lead to what has this flat name; they may have dots themselves."""
    for own, node in tree.items() if isinstance(tree, dict) else ():
        if str(own) == key:
            return (own,)
        below = _find(node, key[len(str(own)) + 1 :]) if key.startswith(f"{own}.") else None
        if below is not None:
            return (own, *below)
    return None


def merge(one: Any, other: Any) -> Any:
    """Two trees of one nesting whose leaves complete each other; where both have one, the first's is taken.

    A None in a list is a place that is filled elsewhere; in a dict it is a value.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        both = {key: merge(one[key], other[key]) for key in one if key in other}
        return {
            key: both[key] if key in both else one.get(key, other.get(key)) for key in dict.fromkeys((*one, *other))
        }
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [b if a is None else merge(a, b) for a, b in zip(one, other, strict=True)]
    return one
