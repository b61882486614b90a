"""What each rank of a job would read of a step, without that job: from the record, and what is assumed of its model.

Assumed is what FSDP2 and tensor parallelism do. Along a dimension of the mesh called "tp" a tensor lies as it was saved
along "tp"; along "replicate" it is the same everywhere; along every other, dimension 0 is cut evenly. What was whole in
a step that has sharded tensors, as buffers are, stays whole; if nothing was sharded, everything is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.fit import Fit, WantedTensor, WantedValue
from shardckpt.engine.loading.selecting.reads import reads_of
from shardckpt.engine.loading.selecting.report import LoadPlan, RankReads
from shardckpt.engine.loading.selecting.selection import Selection
from shardckpt.engine.loading.sources import Sources
from shardckpt.engine.sharding import mesh_coordinate
from shardckpt.format.manifest import LayoutEntry, Manifest, MeshEntry
from shardckpt.format.placement import parse_placement, shard_boxes
from shardckpt.tools.looking.meant import step_meant
from shardckpt.tools.place import Where, opened

_COPIES = ("replicate", "dp_replicate", "ddp")
"""What dimensions are called along which everything is the same."""
_MOST_RANKS = 1 << 14


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """What a job on that mesh would read."""

    mesh: Mapping[str, int]
    plan: LoadPlan
    """`left` is empty, for no state is there."""
    own: tuple[str, ...]
    """Keys that some ranks saved and others did not, or not alike: counted is what a rank of the same number saved."""


def plan_reading(
    where: Where,
    mesh: Mapping[str, int] | None = None,
    *,
    step: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    storage_options: Mapping[str, object] | None = None,
) -> ReadingPlan:
    """Plan the load of a step, the newest if none is named, on a mesh of these dimensions, the last of them fastest.

    Without `mesh`, on that on which it was saved. Reads the record and nothing else. `ValueError` for a mesh of which
    nothing can be said; else as `inspect`.
    """
    if mesh is not None:
        _check(mesh)
    with opened(where, storage_options) as place:
        folder, manifest = step_meant(place, step)
        url = f"{place.storage.url.rstrip('/')}/{folder}"
    if mesh is None:
        _check(mesh := saved_mesh(manifest))
    entry = MeshEntry(tuple(mesh), tuple(mesh.values()), tuple(range(math.prod(mesh.values()))))
    planner = _Planner(manifest, Selection(include, exclude), entry)
    ranks = tuple(planner.reads(rank) for rank in entry.ranks)
    return ReadingPlan(dict(mesh), planner.plan(url, ranks), tuple(sorted(planner.own)))


def saved_mesh(manifest: Manifest) -> dict[str, int]:
    """That on which a step was saved: the device mesh of all its ranks, if its tensors were on one; else data x tensor
    parallel."""
    ranks, shards = manifest.world_size, manifest.shards
    for mesh in manifest.meshes:
        if len(mesh.ranks) == ranks and len({*mesh.dims}) == len(mesh.dims):
            return dict(zip(mesh.dims, mesh.shape, strict=True))
    return {"dp": ranks // shards, "tp": shards} if shards > 1 else {"dp": ranks}


def _check(mesh: Mapping[str, int]) -> None:
    names, shape = tuple(mesh), tuple(mesh.values())
    if not names or min(shape) < 1 or math.prod(shape) > _MOST_RANKS or "pp" in names:
        raise ValueError(
            f"a mesh has dimensions of 1 or more ranks, at most {_MOST_RANKS} in all, and none called pp, for only the "
            f"model can say which stage has which layers; not {dict(mesh)}"
        )


class _Planner:
    def __init__(self, manifest: Manifest, selection: Selection, mesh: MeshEntry) -> None:
        self._manifest, self._mesh = manifest, mesh
        self._view = selection.view(manifest)
        tables = self._view.manifest.tables
        self._tensors = dict.fromkeys(name for table in tables for name in table.tensors)
        self._values = dict.fromkeys(name for table in tables for name in table.values)
        said = selection.say(lambda: sorted({*self._tensors, *self._values, *self._view.passed_over}), manifest)
        self._problems = tuple(selection.problems([said]))
        self._any_cut = any(placement != "R" for layout in manifest.layouts for placement in layout.placements)
        self._any_cut |= any(layout.pieces for layout in manifest.layouts)
        self.own: set[str] = set()

    def reads(self, rank: int) -> RankReads:
        """What this rank would read."""
        at = mesh_coordinate(self._mesh, rank)
        sources, fit = Sources(self._view.manifest, self._coordinates(rank, at)), Fit()
        for name in self._tensors:
            entry = sources.tensor(name, "own")
            if entry is not None and sources.part_rank([name], "own") is not None:
                placements = self._placements(self._manifest.layouts[entry.layout], len(entry.shape))
                boxes = shard_boxes(entry.shape, self._mesh.shape, placements, at)
                fit.tensors.append(WantedTensor(name, entry.dtype, entry.shape, boxes, None, "own"))
            else:
                self.own.add(name)
        for name in self._values:
            if sources.part_rank([name], "own") is not None:
                fit.values.append(WantedValue(name, (), "own"))
            else:
                self.own.add(name)
        return reads_of(fit, sources, self._manifest, rank)

    def plan(self, url: str, ranks: tuple[RankReads, ...]) -> LoadPlan:
        """All ranks' reads together."""
        return LoadPlan(
            step=self._manifest.step,
            url=url,
            stored_nbytes=self._manifest.nbytes,
            ranks=ranks,
            changed=tuple(sorted({*self._tensors, *self._values})),
            left={},
            dropped=tuple(sorted(self._view.passed_over)),
            problems=self._problems,
        )

    def _coordinates(self, rank: int, at: Sequence[int]) -> Coordinates:
        shards = dict(zip(self._mesh.dims, self._mesh.shape, strict=True)).get("tp", 1)
        if shards == 1:
            return Coordinates(rank, len(self._mesh.ranks), 0, 1, self._mesh.ranks)
        dim = self._mesh.dims.index("tp")
        alike = tuple(other for other in self._mesh.ranks if mesh_coordinate(self._mesh, other)[dim] == at[dim])
        return Coordinates(rank, len(self._mesh.ranks), at[dim], shards, alike)

    def _placements(self, layout: LayoutEntry, ndim: int) -> list[str]:
        """How a tensor of this layout would lie."""
        cut_at = self._cut_by_tp(layout)
        was_cut = any(placement != "R" for placement in layout.placements) or bool(layout.pieces)
        is_cut = ndim > 0 and (was_cut or not self._any_cut)
        placements: list[str] = []
        factor = 1  # in how many pieces dimension 0 has been cut already when the data-parallel ranks cut it
        for name, size in reversed(list(zip(self._mesh.dims, self._mesh.shape, strict=True))):
            if name == "tp":
                placements.append("R" if cut_at is None else f"S({cut_at})")
                factor *= size if cut_at == 0 else 1
            elif name in _COPIES or not is_cut:
                placements.append("R")
            else:
                placements.append("S(0)" if factor == 1 else f"SS(0,{factor})")
        return placements[::-1]

    def _cut_by_tp(self, layout: LayoutEntry) -> int | None:
        """The dimension of the tensor that was cut by tensor parallelism when it was saved."""
        if layout.mesh is None or "tp" not in self._manifest.meshes[layout.mesh].dims:
            return None
        parsed = parse_placement(layout.placements[self._manifest.meshes[layout.mesh].dims.index("tp")])
        return parsed[0] if parsed is not None else None
