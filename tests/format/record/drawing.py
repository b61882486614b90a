"""Records drawn at random, well-formed each, for properties."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from shardckpt.format.index import ITEMSIZE
from shardckpt.format.layout import (
    LAST_STEP,
    blob_folder,
    frozen_file,
    frozen_rank_file,
    model_file,
    rank_file,
    replicated_file,
)
from shardckpt.format.manifest import (
    HOMES,
    VALUE_HOMES,
    FileEntry,
    Home,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    TensorEntry,
)
from shardckpt.format.placement import Piece
from tests.format.record.records import JSON, KEYS

SIZES = st.integers(0, (1 << 62) - 1)
CRCS = st.integers(0, (1 << 32) - 1)


@st.composite
def files(draw: st.DrawFn, world: int) -> tuple[FileEntry, ...]:
    made = []
    for name in draw(
        st.lists(st.from_regex(r"[a-z0-9_.]{0,6}[a-z0-9]/?[a-z]{1,3}", fullmatch=True), unique=True, max_size=5)
    ):
        nbytes = draw(SIZES)
        extents: list[Any] = [None, None]
        if draw(st.booleans()):
            at = draw(st.integers(0, nbytes))
            extents = [(at, draw(st.integers(0, nbytes - at)), draw(CRCS)) for _ in range(2)]
        kind, writer = draw(st.text(max_size=5)), draw(st.integers(0, world - 1))
        made.append(FileEntry(f"f/{name}", nbytes, draw(CRCS), kind, writer, *extents))
    if draw(st.booleans()):
        made.append(blob("frozen_rank_1.pt", "frozen_rank", draw(CRCS), writer=draw(st.integers(0, world - 1))))
    folders = {entry.name.rpartition("/")[0] for entry in made}
    return tuple(entry for entry in made if entry.name not in folders)


def blob(name: str, kind: str, crc: int, *, writer: int = 0) -> FileEntry:
    """A file that other steps may refer to."""
    key = f"{blob_folder(f'{crc:064x}', 'abcdefgh')}/{name}"
    return FileEntry(name, 40, crc, kind, writer, (0, 20, 1), (20, 20, 2), key)


@st.composite
def manifests(draw: st.DrawFn, *, most_ranks: int = 24) -> Manifest:
    world = draw(st.integers(1, most_ranks))
    meshes = tuple(draw(st.lists(meshes_of(world), max_size=3)))
    layouts = tuple(draw(st.lists(layouts_on(meshes), max_size=4)))
    groups = draw(st.integers(1, min(3, world)))
    tables = [draw(tables_of(tuple(range(first, world, groups)), meshes, layouts)) for first in range(groups)]
    manifest = Manifest(
        step=draw(st.integers(0, LAST_STEP)),
        attempt=draw(st.from_regex(r"[0-9a-z]{8,64}", fullmatch=True)),
        created=draw(KEYS),
        shard_of=tuple(draw(st.lists(st.integers(0, world - 1), min_size=world, max_size=world))),
        files=draw(files(world)),
        meshes=meshes,
        layouts=layouts,
        tables=tuple(tables),
        differ=tuple(draw(st.lists(KEYS, unique=True, max_size=3))),
        mesh_sizes=draw(st.dictionaries(KEYS, SIZES, max_size=3)),
        versions=draw(st.dictionaries(KEYS, KEYS, max_size=3)),
        metadata=draw(st.dictionaries(KEYS, JSON, max_size=3)),
        model_key=draw(st.just("model") | KEYS),
    )
    return only_model(manifest) if draw(st.booleans()) else manifest


def only_model(manifest: Manifest) -> Manifest:
    """The same as if all that it has were of the model."""
    key = manifest.model_key
    tables = [
        replace(
            table,
            tensors={f"{key}.{name}": entry for name, entry in table.tensors.items()},
            values={f"{key}.{name}": home for name, home in table.values.items()},
        )
        for table in manifest.tables
    ]
    return replace(manifest, tables=tuple(tables), model_only=True)


@st.composite
def saves(draw: st.DrawFn, homes: tuple[Home, ...] = HOMES) -> Manifest:
    """A record with every file that its tables speak of and some more, as a save leaves it; some keys are of the model.

    `homes`: in which kinds of files there is any state.
    """
    manifest = replace(draw(manifests(most_ranks=6)), model_only=False)
    tables, layouts = _with_pieces(draw, manifest)
    home_of = {home: home if home in homes else homes[0] for home in HOMES}
    prefix = draw(st.sampled_from(["", f"{manifest.attempt}/"]))
    named = [_named(draw, table, manifest.model_key) for table in tables if table.ranks]
    keys = [key for table in named for key in (*table.tensors, *table.values)]
    return replace(
        manifest,
        layouts=tuple(replace(layout, home=home_of[layout.home]) for layout in layouts),
        tables=tuple(replace(t, values={key: home_of[home] for key, home in t.values.items()}) for t in named),
        files=tuple(replace(file, name=prefix + file.name) for file in _files_of(draw, manifest, homes)),
        differ=tuple(draw(st.lists(st.sampled_from(keys), unique=True, max_size=2))) if keys else (),
    )


def _named(draw: st.DrawFn, table: Table, model_key: str) -> Table:
    """With names of which some are the model's."""
    tops = st.sampled_from([model_key, "optimizer", f"{model_key}_2"])
    new = {key: f"{draw(tops)}.{key}" for key in (*table.tensors, *table.values)}
    tensors = {new[key]: entry for key, entry in table.tensors.items()}
    return replace(table, tensors=tensors, values={new[key]: home for key, home in table.values.items()})


def _with_pieces(draw: st.DrawFn, manifest: Manifest) -> tuple[tuple[Table, ...], tuple[LayoutEntry, ...]]:
    """Perhaps one tensor more, that two ranks have written in pieces."""
    if draw(st.booleans()):
        return manifest.tables, manifest.layouts
    one, other = (draw(st.integers(0, manifest.world_size - 1)) for _ in range(2))
    pieces = (Piece(one, (0, 0), (5, 4)), Piece(other, (5, 0), (3, 4)))
    entry = TensorEntry("float32", (8, 4), len(manifest.layouts))
    first, *rest = manifest.tables
    tables = (replace(first, tensors={**first.tensors, "in pieces": entry}), *rest)
    return tables, (*manifest.layouts, LayoutEntry("rank", pieces=pieces))


def _files_of(draw: st.DrawFn, manifest: Manifest, homes: tuple[Home, ...]) -> list[FileEntry]:
    shards = manifest.shards
    named = [(rank_file(rank), "rank") for rank in range(manifest.world_size) if "rank" in homes]
    for shard in range(shards):
        named += [(model_file(shard, shards), "model")] if "model" in homes else []
        named += [(replicated_file(shard, shards), "replicated")] if "replicated" in homes else []
    frozen = [(frozen_rank_file(rank), "frozen_rank") for rank in range(manifest.world_size) if "frozen_rank" in homes]
    frozen += [(frozen_file(shard, shards), "frozen") for shard in range(shards) if "frozen" in homes]
    others = [
        ("metadata.pt", "metadata"),
        ("vocab.json", "cc"),
        ("tokenizer/rank_0.pt", "cc"),
        ("notes", "of tomorrow"),
    ]
    named += draw(st.lists(st.sampled_from(others), unique=True))
    files = [FileEntry(name, draw(st.integers(0, 99)), draw(CRCS), kind, 0) for name, kind in named]
    return files + [blob(name, kind, draw(CRCS)) for name, kind in frozen]


@st.composite
def meshes_of(draw: st.DrawFn, world: int) -> MeshEntry:
    shape = draw(st.lists(st.integers(1, 4), max_size=3).filter(lambda sizes: math.prod(sizes) <= world))
    ranks = draw(st.permutations(range(world)))[: math.prod(shape)]
    dims = draw(st.lists(KEYS, unique=True, min_size=len(shape), max_size=len(shape)))
    return MeshEntry(tuple(dims), tuple(shape), tuple(ranks))


@st.composite
def layouts_on(draw: st.DrawFn, meshes: tuple[MeshEntry, ...]) -> LayoutEntry:
    home = draw(st.sampled_from(HOMES))
    if not meshes or draw(st.booleans()):
        return LayoutEntry(home)
    mesh = draw(st.integers(0, len(meshes) - 1))
    placement = st.sampled_from(["R", "S(0)", "S(1)", "SS(0,2)", "SS(1,16)"])
    count = len(meshes[mesh].shape)
    return LayoutEntry(home, mesh, tuple(draw(st.lists(placement, min_size=count, max_size=count))))


@st.composite
def tables_of(draw: st.DrawFn, ranks: tuple[int, ...], meshes: tuple, layouts: tuple) -> Table:
    names = draw(st.lists(KEYS, unique=True, max_size=8))
    tensors: dict[str, TensorEntry] = {}
    for name in names[: len(names) // 2 if layouts else 0]:
        number = draw(st.integers(0, len(layouts) - 1))
        layout = layouts[number]
        shape = tuple(draw(st.lists(st.integers(0, 1 << 20), min_size=2, max_size=3)))
        sizes = meshes[layout.mesh].shape if layout.mesh is not None else ()
        replicas = math.prod(n for n, p in zip(sizes, layout.placements, strict=True) if p == "R")
        dtype = draw(st.sampled_from(sorted(set(ITEMSIZE) - {"complex128"})))
        tensors[name] = TensorEntry(dtype, shape[:2], number, draw(st.integers(0, replicas - 1)))
    values = {name: draw(st.sampled_from(VALUE_HOMES)) for name in names if name not in tensors}
    return Table(ranks, tensors, values)
