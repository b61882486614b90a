"""Which ranks are asked for parts of a sharded tensor: the same as whoever looks at every rank would ask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.finding.shards import Shards, strides_of
from shardckpt.engine.loading.sources import Sources
from shardckpt.engine.sharding import mesh_coordinate, replica_number
from shardckpt.format.manifest import OF_RANK, Home, LayoutEntry, Manifest, MeshEntry, Table, TensorEntry
from shardckpt.format.placement import Box, shard_boxes
from tests.format.record.records import RECORD


def by_looking_at_all(manifest: Manifest, entry: TensorEntry, part: Box, shard: int, *, near: bool) -> dict[Any, Any]:
    """By box, the number of who is asked: of the rank where each has a file of its own, else of the model shard."""
    layout = manifest.layouts[entry.layout]
    assert layout.mesh is not None
    mesh = manifest.meshes[layout.mesh]
    found: dict[Any, int] = {}
    for position, rank in enumerate(mesh.ranks):
        at = mesh_coordinate(mesh, position)
        if layout.home in OF_RANK and replica_number(mesh.shape, layout.placements, at) != entry.replica:
            continue
        own = manifest.shard_of[rank]
        boxes = shard_boxes(entry.shape, mesh.shape, layout.placements, at)
        if any(overlap(box, part) for box in boxes):
            for box in boxes:
                key = (box.offsets, box.lengths)
                if key not in found or (near and own == shard and layout.home not in OF_RANK):
                    found[key] = rank if layout.home in OF_RANK else own
    return found


def overlap(one: Box, other: Box) -> bool:
    rows = zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in rows)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Manifest, TensorEntry, Box, int, bool]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = math.prod(sizes)
    ranks = draw(st.permutations(range(count + draw(st.integers(0, 3)))))
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=2)))
    dims = st.integers(0, len(shape) - 1)
    cut = dims.map(lambda dim: f"S({dim})") | dims.map(lambda dim: f"SS({dim},{sizes[-1]})")
    placements = tuple(draw(st.one_of(st.just("R"), cut)) for _ in sizes)
    shards = draw(st.integers(1, 3))
    shard_of = tuple(draw(st.lists(st.integers(0, shards - 1), min_size=len(ranks), max_size=len(ranks))))
    home: Home = draw(st.sampled_from(["rank", "model", "replicated", "frozen", "frozen_rank"]))
    replicas = math.prod(size for size, text in zip(sizes, placements, strict=True) if text == "R")
    mesh = MeshEntry(tuple(f"d{number}" for number in range(len(sizes))), tuple(sizes), tuple(ranks[:count]))
    layouts = (LayoutEntry(home, 0, placements),)
    manifest = replace(RECORD, shard_of=shard_of, meshes=(mesh,), layouts=layouts, tables=(), files=())
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(draw(st.integers(1, size - at)) for at, size in zip(offsets, shape, strict=True))
    entry = TensorEntry("uint8", shape, 0, draw(st.integers(0, replicas - 1)))
    return (
        manifest,
        entry,
        Box(offsets, lengths, (0,) * len(shape)),
        draw(st.integers(0, shards - 1)),
        draw(st.booleans()),
    )


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_same_are_asked(case: Any) -> None:
    manifest, entry, part, shard, near = case
    found = Shards(manifest, shard).of(entry, [part, part], near=near, most=1 << 19)
    of_rank = manifest.layouts[0].home in OF_RANK
    asked = {(box.offsets, box.lengths): rank if of_rank else manifest.shard_of[rank] for rank, box in found}
    assert len(asked) == len(found), "each box once"
    assert asked == by_looking_at_all(manifest, entry, part, shard, near=near)


def test_strides() -> None:
    assert strides_of((4, 3, 2)) == (6, 2, 1)
    assert strides_of((5,)) == (1,)
    assert strides_of(()) == ()


def test_the_ranks_are_not_counted_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the whole of a tensor of 8,192 ranks takes as many looks at 8,192 ranks."""
    count, ranks, asked = Manifest.shards, 256, 0

    def counted(manifest: Manifest) -> int:
        nonlocal asked
        asked += 1
        return int(count.fget(manifest))  # type: ignore[attr-defined]

    monkeypatch.setattr(Manifest, "shards", property(counted))
    mesh = MeshEntry(("dp",), (ranks,), tuple(range(ranks)))
    table = Table(mesh.ranks, {"w": TensorEntry("uint8", (ranks,), 0)}, {})
    terms: dict[str, Any] = {"meshes": (mesh,), "layouts": (LayoutEntry("rank", 0, ("S(0)",)),), "tables": (table,)}
    manifest = replace(RECORD, shard_of=(0,) * ranks, files=(), **terms)
    sources = Sources(manifest, Coordinates(0, 1, 0, 1, (0,)))
    assert len(sources.chunks("w", "first")) == len(sources.files()) == ranks
    assert asked == 1
