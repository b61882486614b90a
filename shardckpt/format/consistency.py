"""What must hold between the parts of a commit record. Checked before it is written, and again when it is read."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardckpt.format.index import ITEMSIZE, MAX_DIMS
from shardckpt.format.layout import (
    CARBON_COPY,
    CONSOLIDATED,
    FROZEN,
    FROZEN_OF_RANK,
    LAST_STEP,
    MANIFEST,
    SCORE,
    check_blob_key,
    check_file_name,
    is_attempt,
    model_file,
)
from shardckpt.format.placement import is_tiling, parse_placement
from shardckpt.format.record.columns import FileColumns, loose

if TYPE_CHECKING:
    from shardckpt.format.manifest import FileEntry, LayoutEntry, Manifest, MeshEntry, Table

MAX_WORLD = 1 << 18
"""Ranks of a job."""
_MAX_NBYTES = 1 << 62
_FROZEN = (FROZEN, FROZEN_OF_RANK)


def check_manifest(manifest: Manifest) -> None:
    """`ValueError` for the first thing in a record that contradicts another, or that no save could have written."""
    world = manifest.world_size
    if not is_attempt(manifest.attempt):
        raise ValueError(f"{manifest.attempt[:80]!r} is not an attempt id")
    if not 0 <= manifest.step <= LAST_STEP:
        raise ValueError(f"there is no step {manifest.step}")
    if not 0 < world <= MAX_WORLD:
        raise ValueError(f"a job of {world} ranks")
    if not all(0 <= shard < world for shard in manifest.shard_of):
        raise ValueError("a rank has a model shard of a higher number than there are ranks")
    if len(set(manifest.differ)) != len(manifest.differ):
        raise ValueError("a key is said twice to differ")
    _check_files(manifest.files, world)
    _check_kinds(manifest)
    _check_blobs(manifest.files)
    for mesh in manifest.meshes:
        _check_mesh(mesh, world)
    replicas = [_check_layout(layout, manifest.meshes, world) for layout in manifest.layouts]
    _check_ranks([rank for table in manifest.tables for rank in table.ranks], world, "the tables")
    least_dims = [_least_dims(layout) for layout in manifest.layouts]  # once, for there may be as many tables
    terms = (manifest.meshes, manifest.layouts)
    for table in manifest.tables:
        if not table.ranks:
            raise ValueError("a table of what no rank holds")
        if not (table.sound and all(map(operator.is_, table.sound, terms))):  # neither is ever changed
            _check_table(table, least_dims, replicas)
            if table.text:
                object.__setattr__(table, "sound", terms)
    _check_pieces(manifest)
    if manifest.model_only:
        _check_model_only(manifest)


def _check_files(files: Sequence[FileEntry], world: int) -> None:
    """Families of files are called alike, in one folder, and are checked for themselves when they are read."""
    columns = files if isinstance(files, FileColumns) else FileColumns(files, ())
    alone, families = columns.loose, columns.families
    names = {check_file_name(file.name) for file in alone}
    if len(names) != len(alone) or any(map(columns.in_family, names)):
        raise ValueError("a file is named twice")
    some = names | {family.name(0) for family in families}
    folders = {"/".join(parts[:depth]) for parts in (n.split("/") for n in some) for depth in range(1, len(parts))}
    if any(map(columns.in_family, folders)) or not names.isdisjoint(folders) or MANIFEST in names:
        raise ValueError("a file has the name of a folder or of the record itself")
    for family in families:
        if min(family.writers) < 0 or max(family.writers) >= world:
            raise ValueError(f"files like {family.name(0)} were written by a rank that is none of {world}")
    for file in alone:
        if not 0 <= file.writer < world:
            raise ValueError(f"{file.name} was written by rank {file.writer} of {world}")
        for extent in (file.index, file.tree):
            if extent is not None and extent[0] + extent[1] > file.nbytes:
                raise ValueError(
                    f"bytes {extent[0]} to {extent[0] + extent[1]} of {file.name}, which has {file.nbytes}"
                )


def _check_kinds(manifest: Manifest) -> None:
    """Of files that no table speaks of. Names may begin with the attempt's folder, as they do on an object store."""
    files = loose(manifest.files)  # families are of other kinds, and their names end in numbers
    names = {file.name: file.name.removeprefix(f"{manifest.attempt}/") for file in files}
    if SCORE in names.values():
        raise ValueError(f"a file has the name of the score, {SCORE}, which is replaced when the step is scored")
    for file in files:
        if file.kind == CARBON_COPY and (file.index is not None or file.tree is not None):
            raise ValueError(f"{file.name}: a copy of a file of others has no index and no tree")
    consolidated = [file for file in files if file.kind == CONSOLIDATED]
    if len(consolidated) > 1:
        raise ValueError(f"the model is consolidated in {len(consolidated)} files")
    for file in consolidated:
        if file.index is None or file.tree is None:
            raise ValueError(f"{file.name}: a consolidated model without its index and its tree")
        if names[file.name] != model_file(0, 1):
            raise ValueError(f"{file.name}: a consolidated model is called {model_file(0, 1)}")


def _check_blobs(files: Sequence[FileEntry]) -> None:
    """What is frozen lies in blobs and nothing else does; each is an archive, under its own name, named once."""
    files = loose(files)
    for file in files:
        if (file.kind in _FROZEN) != bool(file.blob):
            raise ValueError(f"{file.name}: files of what is frozen, and no others, are blobs")
        if not file.blob:
            continue
        if check_blob_key(file.blob).rpartition("/")[2] != file.name.rpartition("/")[2]:
            raise ValueError(f"{file.name}: it is called otherwise in its blob, {file.blob}")
        if file.index is None or file.tree is None:
            raise ValueError(f"{file.name}: a blob without its index and its tree")
    blobs = [file.blob for file in files if file.blob]
    if len(set(blobs)) != len(blobs):
        raise ValueError("two files lie in one blob")


def _check_model_only(manifest: Manifest) -> None:
    for table in manifest.tables:
        for key in (*table.tensors, *table.values):
            if not manifest.is_of_model(key):
                raise ValueError(f"{key}: a record of the model only, and this is not of {manifest.model_key!r}")


def _check_mesh(mesh: MeshEntry, world: int) -> None:
    if len(set(mesh.dims)) != len(mesh.dims) or len(mesh.dims) != len(mesh.shape) or len(mesh.dims) > MAX_DIMS:
        raise ValueError(f"a mesh of shape {list(mesh.shape)[:MAX_DIMS]} with other names of dimensions")
    if not mesh.ranks or math.prod(mesh.shape) != len(mesh.ranks):
        raise ValueError(f"a mesh of shape {list(mesh.shape)} with {len(mesh.ranks)} ranks")
    _check_ranks(mesh.ranks, world, "a mesh")


def _check_ranks(ranks: Sequence[int], world: int, where: str) -> None:
    if len(set(ranks)) != len(ranks) or not all(0 <= rank < world for rank in ranks):
        raise ValueError(f"a rank is named twice in {where}, or it is none of {world} ranks")


def _check_layout(layout: LayoutEntry, meshes: Sequence[MeshEntry], world: int) -> int:
    """How many ranks hold each shard of a tensor of this layout."""
    if layout.pieces and (layout.mesh is not None or layout.home != "rank"):
        raise ValueError("pieces lie in the files of ranks, and on no mesh")
    if not all(0 <= piece.rank < world for piece in layout.pieces):
        raise ValueError(f"a piece was written by a rank that is none of {world}")
    if layout.mesh is None:
        if layout.placements or layout.given:
            raise ValueError("placements or dimensions without a mesh")
        return 1
    if not 0 <= layout.mesh < len(meshes):
        raise ValueError(f"there is no mesh {layout.mesh}")
    shape, dims = meshes[layout.mesh].shape, meshes[layout.mesh].dims
    if layout.given and list(layout.given) != [dim for dim in dims if dim in layout.given]:
        raise ValueError(f"{list(layout.given)} are not dimensions of a mesh of {list(dims)}, in their order")
    if len(layout.placements) != len(shape):
        raise ValueError(f"{len(layout.placements)} placements on a mesh of shape {list(shape)}")
    parsed = [parse_placement(placement) for placement in layout.placements]
    return math.prod(size for size, placement in zip(shape, parsed, strict=True) if placement is None)


def _check_table(table: Table, least_dims: Sequence[int], replicas: Sequence[int]) -> None:
    for name, entry in table.tensors.items():
        if not 0 <= entry.layout < len(least_dims):
            raise ValueError(f"{name}: there is no layout {entry.layout}")
        if not least_dims[entry.layout] <= len(entry.shape) <= MAX_DIMS:
            raise ValueError(f"{name}: a tensor of {len(entry.shape)} dimensions, split by those that it lacks")
        if not 0 <= entry.replica < replicas[entry.layout]:
            raise ValueError(f"{name}: replica {entry.replica} of {replicas[entry.layout]}")
        if entry.dtype not in ITEMSIZE or math.prod(entry.shape) * ITEMSIZE[entry.dtype] >= _MAX_NBYTES:
            raise ValueError(f"{name}: a tensor of dtype {entry.dtype} and shape {list(entry.shape)} cannot be")
    astray = [key for key, home in table.values.items() if home in _FROZEN]
    if astray:
        raise ValueError(f"{astray[0]} is a value, and only tensors can be frozen")
    twice = table.tensors.keys() & table.values.keys()
    if twice:
        raise ValueError(f"{min(twice)} is both a tensor and a value")


def _check_pieces(manifest: Manifest) -> None:
    if not any(layout.pieces for layout in manifest.layouts):
        return
    used = {(entry.layout, entry.shape): name for table in manifest.tables for name, entry in table.tensors.items()}
    for (number, shape), name in used.items():
        pieces = manifest.layouts[number].pieces
        if pieces and not is_tiling(shape, pieces):
            raise ValueError(f"{name}: its pieces do not make up a tensor of shape {list(shape)}")


def _least_dims(layout: LayoutEntry) -> int:
    """Dimensions that a tensor needs to be split so."""
    split = [parsed[0] + 1 for parsed in map(parse_placement, layout.placements) if parsed is not None]
    return max(split, default=0)
