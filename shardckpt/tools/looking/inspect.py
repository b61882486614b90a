"""Inspect: files, tensors and sizes of one step, from its record and the indexes in its files. No torch; any thread.

No byte of a tensor is read: one request for the record, and one for each file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardckpt.engine.loading.selecting.names import Patterns
from shardckpt.format.checksum import crc32
from shardckpt.format.index import ITEMSIZE, ArchiveIndex, decode_index
from shardckpt.format.manifest import FileEntry, LayoutEntry, Manifest
from shardckpt.run.requests import each
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.looking.meant import step_meant
from shardckpt.tools.place import Where, opened


@dataclass(frozen=True, slots=True)
class TensorLine:
    """A whole tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    placement: str
    """On each dimension of its mesh: "dp=2:S(0) tp=2:R"; "3 pieces" if it lies so; "per rank" or "per shard" if each of
    these has another tensor of that name, of which this is one; else "-"."""
    home: str
    """In which kind of file: model, replicated, rank."""
    ranks: int
    """How many ranks had it in their state, or a part of it."""
    tied_to: str | None = None
    """Another tensor whose bytes it has; it needs no room of its own."""


@dataclass(frozen=True, slots=True)
class FileLine:
    """A file of the step."""

    name: str
    kind: str
    writer: int
    """The rank that wrote it, or the first of those that did."""
    nbytes: int
    tensors: int | None = None
    """Or parts of tensors; None if it has no index, as copies of your files have none."""
    tensor_nbytes: int | None = None
    problem: str | None = None
    """Why its index cannot be read."""


@dataclass(frozen=True, slots=True)
class RankLine:
    """What a rank wrote."""

    rank: int
    shard: int
    """Its model shard: the number in `model.<shard>.pt`."""
    files: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a step. With a filter, only the tensors and values that it matches; files and ranks are all."""

    url: str
    """Of the step, without credentials."""
    step: int
    attempt: str
    """On object stores the names of its files begin with this and a slash."""
    created: str
    """UTC, ISO 8601."""
    world_size: int
    mesh: Mapping[str, int]
    versions: Mapping[str, str]
    metadata: Mapping[str, object]
    model_only: bool
    nbytes: int
    """Of all files."""
    tensors: tuple[TensorLine, ...]
    values: tuple[str, ...]
    """Names of the Python values."""
    files: tuple[FileLine, ...]
    ranks: tuple[RankLine, ...]

    @property
    def tensor_nbytes(self) -> int:
        """Of the whole tensors that are shown, tied ones once."""
        return sum(line.nbytes for line in self.tensors if line.tied_to is None)


@dataclass(frozen=True, slots=True)
class ModuleLine:
    """A name with all that lies below it, tied tensors once."""

    name: str
    depth: int
    """Names above it."""
    tensors: int
    nbytes: int


def inspect(
    where: Where,
    *,
    step: int | None = None,
    only: Sequence[str] = (),
    storage_options: Mapping[str, object] | None = None,
) -> Inspection:
    """Look into a step of a run, the newest if none is named. Errors as in `verify`, and `CheckpointDamagedError` for
    a record that is damaged; a file whose index is lost or damaged is reported.

    Args:
        where: a run or one step of it; a path, URL or `Storage`.
        step: which one.
        only: patterns, as in `LoadPolicy(include=...)`, for the tensors and values that are shown.
        storage_options: for fsspec; never logged.
    """
    with opened(where, storage_options) as place:
        folder, manifest = step_meant(place, step)
        looked = each(lambda file: _index(place.storage, file.key_in(folder), file), manifest.files)
        url = f"{place.storage.url.rstrip('/')}/{folder}"
    indexes = {file.name: found for file, found in zip(manifest.files, looked, strict=True)}
    patterns = Patterns(only)

    def is_shown(name: str) -> bool:
        return not only or bool(patterns.matching(name))

    values = dict.fromkeys(key for table in manifest.tables for key in table.values)
    return Inspection(
        url=url,
        step=manifest.step,
        attempt=manifest.attempt,
        created=manifest.created,
        world_size=manifest.world_size,
        mesh=dict(manifest.mesh_sizes),
        versions=dict(manifest.versions),
        metadata=dict(manifest.metadata),
        model_only=manifest.model_only,
        nbytes=manifest.nbytes,
        tensors=tuple(line for line in _tensors(manifest, indexes.values()) if is_shown(line.name)),
        values=tuple(filter(is_shown, values)),
        files=tuple(_file(file, indexes[file.name]) for file in manifest.files),
        ranks=tuple(_ranks(manifest)),
    )


def modules(tensors: Iterable[TensorLine], *, depth: int | None = None) -> list[ModuleLine]:
    """Sizes by module: every name above a tensor, and the tensors themselves, as a tree from the top down.

    In the order of the tensors. With `depth`, no names that have more than so many above them.
    """
    count, nbytes = Counter[str](), Counter[str]()
    order: dict[str, dict[str, None]] = {"": {}}
    for line in tensors:
        pieces = line.name.split(".")
        for end in range(1, len(pieces) + 1):
            name = ".".join(pieces[:end])
            order.setdefault(".".join(pieces[: end - 1]), {})[name] = None
            count[name] += 1
            nbytes[name] += 0 if line.tied_to else line.nbytes
    found: list[ModuleLine] = []
    waiting = [(name, 0) for name in reversed(order[""])]
    while waiting:
        name, level = waiting.pop()
        found.append(ModuleLine(name, level, count[name], nbytes[name]))
        if depth is None or level < depth:
            waiting += [(below, level + 1) for below in reversed(order.get(name, {}))]
    return found


def placement_text(manifest: Manifest, layout: LayoutEntry) -> str:
    """How tensors of a layout lie, in a few words."""
    if layout.pieces:
        return f"{len(layout.pieces)} pieces"
    if layout.mesh is None:
        return "-"
    mesh = manifest.meshes[layout.mesh]
    dims = zip(mesh.dims, mesh.shape, layout.placements, strict=True)
    return " ".join(f"{dim}={size}:{placement}" for dim, size, placement in dims)


def _index(storage: Storage, key: str, file: FileEntry) -> ArchiveIndex | str | None:
    """The index of a file, why it cannot be read, or None if it should have none."""
    if file.index is None:
        return None
    at, nbytes, crc = file.index
    content = bytearray(nbytes)
    try:
        storage.read_into([Read(key, at, memoryview(content))])
        if crc32(content) != crc:
            return "its index is damaged"
        return decode_index(bytes(content), file.nbytes)
    except (FileNotFoundError, EOFError):
        return "it is missing, or shorter than it was"
    except (OSError, ValueError) as error:
        return f"its index cannot be read: {error}"


def _tensors(manifest: Manifest, indexes: Iterable[ArchiveIndex | str | None]) -> list[TensorLine]:
    ties = _ties(index for index in indexes if isinstance(index, ArchiveIndex))
    holders = Counter[str]()
    for table in manifest.tables:
        holders.update(dict.fromkeys(table.tensors, len(table.ranks)))
    lines: dict[str, TensorLine] = {}
    differ = set(manifest.differ)
    for table in manifest.tables:
        for name, entry in table.tensors.items():
            if name not in lines:
                layout = manifest.layouts[entry.layout]
                nbytes = math.prod(entry.shape) * ITEMSIZE[entry.dtype]
                own = f"per {'rank' if layout.home == 'rank' else 'shard'}" if name in differ else None
                place = (own or placement_text(manifest, layout), layout.home, holders[name])
                lines[name] = TensorLine(name, entry.dtype, entry.shape, nbytes, *place, ties.get(name))
    return list(lines.values())


def _ties(indexes: Iterable[ArchiveIndex]) -> dict[str, str]:
    """Names that share all that they have with another, which comes first."""
    ties: dict[str, str] = {}
    for index in indexes:
        first: dict[object, str] = {}
        for stored in index.boxes:
            other = first.setdefault((stored.record, stored.box, stored.shape), stored.name)
            if other != stored.name:
                ties[stored.name] = other
    return ties


def _file(file: FileEntry, index: ArchiveIndex | str | None) -> FileLine:
    about = (file.name, file.kind, file.writer, file.nbytes)
    if isinstance(index, ArchiveIndex):
        names = {stored.name for stored in index.boxes}
        return FileLine(*about, len(names), sum(record.nbytes for record in index.records))
    return FileLine(*about, problem=index)


def _ranks(manifest: Manifest) -> list[RankLine]:
    files, nbytes = Counter[int](), Counter[int]()
    for file in manifest.files:
        files[file.writer] += 1
        nbytes[file.writer] += file.nbytes
    return [RankLine(rank, shard, files[rank], nbytes[rank]) for rank, shard in enumerate(manifest.shard_of)]
