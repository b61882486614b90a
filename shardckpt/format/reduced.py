"""What a commit record becomes when only the model of its step is kept, and which files then go. Pure; no torch.

Where the model lies decides what stays:

- A consolidated file has all of it: that file. The record becomes that of one process that saved it in `model.pt`.
- It lies in model.<shard>.pt: those files.
- Some of it lies in rank_<r>.pt or replicated.<shard>.pt: every file with a byte of it, whatever else is in there.

Copies of `cc/` and files of kinds that are not known here stay in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardckpt.format.index import ArchiveIndex
from shardckpt.format.layout import CONSOLIDATED, METADATA, rank_file
from shardckpt.format.manifest import (
    HOMES,
    FileEntry,
    Home,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    TensorEntry,
)

_MAY_GO: frozenset[str] = frozenset({*HOMES, METADATA})
"""Kinds of files that go unless the model lies in them."""
_NAMES = re.compile(r"rank_[0-9]+\.pt|(model|replicated|metadata)(\.[0-9]+)?\.pt")
"""What files of these kinds are called."""


class NoModelError(ValueError):
    """The record has no state of a model that could be kept."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """A record of the model alone, and what goes with the rest of the step."""

    manifest: Manifest
    doomed: tuple[FileEntry, ...]
    """Files of the whole step that this record does not name; with them goes no byte of the model."""
    mixed: str = ""
    """Why files that also hold other state stay, for people; empty if there are none."""


def reduce_to_model(
    manifest: Manifest, *, model_key: str | None = None, consolidated: ArchiveIndex | None = None
) -> Reduced:
    """The record of the same attempt that keeps only the model. A record that is so already comes back as it is.

    Called by `run` before anything is changed. `NoModelError` if there is nothing to keep.

    Args:
        model_key: the key of the model's state, if the record does not say the right one.
        consolidated: what the consolidated file, if there is one, says of itself. It is believed where the record's
            tables do not contradict it; a file that lacks a tensor of the model stands for nothing. Without it the
            record's word is taken that such a file has the whole model.
    """
    if manifest.model_only:
        return Reduced(manifest, ())
    if model_key is not None:
        manifest = replace(manifest, model_key=model_key)
    tables = _tables_of(manifest, model=True)
    one = next((file for file in manifest.files if file.kind == CONSOLIDATED), None)
    lacks = ""
    if one is not None:
        tensors = {name: entry for table in tables for name, entry in table.tensors.items()}
        stored = tensors if consolidated is None else _stored_whole(manifest, consolidated)
        lacks = _lack(manifest, tables, stored)
        if not lacks:
            return _in_one_file(manifest, one, tensors | dict(stored), tables)
    if not tables:
        raise NoModelError(
            f"nothing of step {manifest.step} is state of the model, {manifest.model_key!r}: it has "
            f"{', '.join(manifest.parts) or 'no state at all'}{f'; its consolidated file {lacks}' if lacks else ''}"
        )
    return _where_it_lies(manifest, tables, lacks)


def may_be_doomed(name: str) -> bool:
    """Whether a file of this name (without a folder), if the record of the model alone does not name it, goes."""
    return _NAMES.fullmatch(name) is not None


def _tables_of(manifest: Manifest, *, model: bool) -> list[Table]:
    """The tables with only what is of the model, or is not; what becomes alike is joined, what becomes empty goes."""
    ranks: dict[tuple[tuple[tuple[str, TensorEntry], ...], tuple[tuple[str, Home], ...]], list[int]] = {}
    for table in manifest.tables:
        tensors = tuple((key, entry) for key, entry in table.tensors.items() if manifest.is_of_model(key) == model)
        values = tuple((key, home) for key, home in table.values.items() if manifest.is_of_model(key) == model)
        if tensors or values:
            ranks.setdefault((tensors, values), []).extend(table.ranks)
    return [Table(tuple(sorted(own)), dict(tensors), dict(values)) for (tensors, values), own in ranks.items()]


def _stored_whole(manifest: Manifest, index: ArchiveIndex) -> dict[str, TensorEntry]:
    """The tensors of the model of which a file holds all, in one piece."""
    return {
        stored.name: TensorEntry(index.records[stored.record].dtype, stored.shape, 0)
        for stored in index.boxes
        if manifest.is_of_model(stored.name)
        and stored.box.lengths == stored.shape == index.records[stored.record].shape
    }


def _lack(manifest: Manifest, tables: Sequence[Table], stored: Mapping[str, TensorEntry]) -> str:
    """What a consolidated file with these tensors lacks of the model; empty if nothing.

    Tensors without elements are nothing that it must have. Values are taken to be there.
    """
    differing = [key for key in manifest.differ if manifest.is_of_model(key)]
    if differing:
        return f"has {differing[0]} once, which {len(differing)} such keys were saved with another value by each rank"
    if not stored:
        return f"has no tensor of {manifest.model_key!r}"
    names = stored.keys() | {name for table in tables for name in table.tensors}
    for table in tables:
        both = table.values.keys() & names
        if both:
            return f"has {min(both)} once, which was saved as a value by some ranks and as a tensor by others"
        for name, entry in table.tensors.items():
            found = stored.get(name)
            if found is None and math.prod(entry.shape) > 0:
                return f"does not have {name} as a whole"
            if found is not None and (found.dtype, found.shape) != (entry.dtype, entry.shape):
                return f"has {name} as {found.dtype} {list(found.shape)}, not as {entry.dtype} {list(entry.shape)}"
    return ""


def _in_one_file(
    manifest: Manifest, one: FileEntry, tensors: Mapping[str, TensorEntry], tables: Iterable[Table]
) -> Reduced:
    """The record as if one process had saved the model, in the consolidated file; its names stay as they are."""
    doomed = tuple(file for file in manifest.files if file.kind in _MAY_GO)
    kept = [replace(file, writer=0) for file in manifest.files if file.kind not in _MAY_GO and file is not one]
    values: dict[str, Home] = {key: "model" for table in tables for key in table.values}
    whole = {name: TensorEntry(entry.dtype, entry.shape, 0) for name, entry in tensors.items()}
    alone = replace(
        manifest,
        shard_of=(0,),
        files=(replace(one, kind="model", writer=0), *kept),
        meshes=(),
        layouts=(LayoutEntry("model"),),
        tables=(Table((0,), whole, values),),
        differ=(),
        mesh_sizes=dict.fromkeys(manifest.mesh_sizes, 1),
        model_only=True,
    )
    return Reduced(alone, doomed)


def _where_it_lies(manifest: Manifest, tables: Sequence[Table], lacks: str) -> Reduced:
    """The record of the same ranks, and of the files that hold state of the model."""
    homes, ranks = _homes(manifest, tables)
    names = {rank_file(rank) for rank in ranks}
    kept, doomed = list[FileEntry](), list[FileEntry]()
    for file in manifest.files:
        holds = file.kind in homes and (file.kind != "rank" or _base(file) in names)
        (kept if holds or file.kind not in _MAY_GO else doomed).append(file)
    meshes, layouts, numbered = _numbered_anew(manifest, tables)
    reduced = replace(
        manifest,
        files=tuple(kept),
        meshes=meshes,
        layouts=layouts,
        tables=numbered,
        differ=tuple(key for key in manifest.differ if manifest.is_of_model(key)),
        model_only=True,
    )
    others, _ = _homes(manifest, _tables_of(manifest, model=False))
    return Reduced(reduced, tuple(doomed), _why_mixed(lacks) if homes & others else "")


def _homes(manifest: Manifest, tables: Iterable[Table]) -> tuple[set[Home], set[int]]:
    """In which kinds of files there is state of the model, and in the files of which ranks."""
    homes: set[Home] = set()
    ranks: set[int] = set()
    for table in tables:
        homes |= set(table.values.values())
        if "rank" in table.values.values():
            ranks |= set(table.ranks)
        for number in {entry.layout for entry in table.tensors.values()}:
            layout = manifest.layouts[number]
            homes.add(layout.home)
            if layout.home == "rank":
                ranks |= {*table.ranks, *(piece.rank for piece in layout.pieces)}
                ranks |= set(manifest.meshes[layout.mesh].ranks if layout.mesh is not None else ())
    return homes, ranks


def _numbered_anew(
    manifest: Manifest, tables: Iterable[Table]
) -> tuple[tuple[MeshEntry, ...], tuple[LayoutEntry, ...], tuple[Table, ...]]:
    """Only the meshes and layouts that the tables use."""
    meshes: dict[MeshEntry, int] = {}
    layouts: dict[LayoutEntry, int] = {}
    numbered = []
    for table in tables:
        numbers = {}
        for old in dict.fromkeys(entry.layout for entry in table.tensors.values()):
            layout = manifest.layouts[old]
            mesh = None if layout.mesh is None else meshes.setdefault(manifest.meshes[layout.mesh], len(meshes))
            numbers[old] = layouts.setdefault(replace(layout, mesh=mesh), len(layouts))
        tensors = {name: replace(entry, layout=numbers[entry.layout]) for name, entry in table.tensors.items()}
        numbered.append(replace(table, tensors=tensors))
    return tuple(meshes), tuple(layouts), tuple(numbered)


def _why_mixed(lacks: str) -> str:
    if lacks:
        return f"the consolidated file cannot stand for the model: it {lacks}"
    return "the model lies in the files of the ranks, together with their other state, and in no file of its own"


def _base(file: FileEntry) -> str:
    """The name without the attempt's folder, which it has on an object store."""
    return file.name.rpartition("/")[2]
