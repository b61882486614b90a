"""All that a rank held, given back as nested dicts: for those who have no state yet to load into."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.contents import merge
from shardckpt.engine.loading.fit import Fit, WantedTensor, WantedValue
from shardckpt.engine.loading.sources import BelongsToRankError, Sources
from shardckpt.engine.saving.draft import prune
from shardckpt.engine.sharding import Sharding, as_dtensor, local_shape, mesh_coordinate
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.manifest import OF_RANK, LayoutEntry, Manifest, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.placement import local_shape as local_shape_of
from shardckpt.format.tree import map_leaves
from shardckpt.state import Path, join_path


@dataclass(slots=True)
class Holdings:
    """What a rank takes, and how its tensors are sharded."""

    fit: Fit = field(default_factory=Fit)
    shardings: dict[str, tuple[Sharding, tuple[int, ...]]] = field(default_factory=dict)
    """Of a tensor that was a DTensor: how it lies, and its global shape."""
    ranks: tuple[int, ...] = ()
    """The ranks (of those that saved) whose nesting and Python values it takes."""
    elsewhere: dict[str, None] = field(default_factory=dict)
    """Files of other ranks, which stored shards that this rank held as well; they say where these belong."""

    def nested(self, own: Any, others: Iterable[Any], *, step: int) -> dict[str, Any]:
        """The nesting, with the tensors in it, of what this rank takes, and of nothing else that its files hold.

        `own` is the nesting of the files of `ranks`, `others` those of `elsewhere`; of these only tensors are taken
        that the others before them lack. `CheckpointDamagedError` if something has no place anywhere.
        """
        tensors = {wanted.name: wanted.local for wanted in self.fit.tensors}
        left = tensors.keys() | {value.key for value in self.fit.values}
        state: Any = {}
        for number, tree in enumerate((own, *others)):
            placed = self._placed(tree or {}, left if number == 0 else left & tensors.keys(), tensors)
            left -= {join_path(path) for path in placed}
            state = merge(state, prune(tree or {}, placed))
        if left:
            raise CheckpointDamagedError(f"no file of step {step} says where {min(left)} belongs", step=step)
        return dict(state)

    def _placed(self, tree: Any, names: Collection[str], tensors: Mapping[str, torch.Tensor | None]) -> dict[Path, Any]:
        """Where these are in a nesting, and what is to lie there."""
        placed: dict[Path, Any] = {}

        def place(path: Path, leaf: Any) -> None:
            name = join_path(path)
            local = tensors.get(name)
            if name not in names or isinstance(leaf, torch.Tensor) != (local is not None):
                return
            if local is None:
                placed[path] = leaf
            else:
                placed[path] = as_dtensor(local, *self.shardings[name]) if name in self.shardings else local

        map_leaves(tree, place)
        return placed


def holdings(manifest: Manifest, sources: Sources, at: Coordinates) -> Holdings:
    """What this rank takes of a step: on the same ranks its own; on others what all of them held alike.

    Nothing is left out silently: what only some ranks held, or held in shards, is a problem on other ranks.
    """
    found = Holdings()
    same = sources.is_same_job()
    names = sorted(sources.held_by(at.rank)) if same else list(sources.names())
    ranks: dict[int, None] = {}
    for name in names:
        try:
            rank = sources.part_rank([name], "fail")
        except BelongsToRankError as error:
            found.fit.problems.append(f"per rank: {error}")
            continue
        assert rank is not None
        ranks[rank] = None
        entry = sources.tensor(name, "fail")
        if entry is None:
            found.fit.values.append(WantedValue(name, (), "fail"))
        else:
            sharding = _sharding(manifest, entry, at if same else None)
            _want(found, name, entry, sharding, manifest, at.rank if same else None)
            writer = _writer(manifest, entry, sharding)
            if writer not in (None, rank):
                found.elsewhere[sources.files_of(writer, manifest.layouts[entry.layout].home)] = None
    found.ranks = tuple(ranks)
    found.fit.trees[""] = found.ranks
    return found


def _want(
    found: Holdings, name: str, entry: TensorEntry, sharding: Sharding | None, manifest: Manifest, rank: int | None
) -> None:
    layout, shape = manifest.layouts[entry.layout], entry.shape
    own_pieces = _own_pieces(layout, manifest, rank)
    if sharding is not None:
        boxes, own = sharding.boxes(shape), local_shape(sharding, shape)
        found.shardings[name] = (sharding, shape)
    elif layout.pieces and own_pieces:
        boxes, own = own_pieces, local_shape_of(own_pieces, len(shape))
    elif _is_cut(layout) or (layout.pieces and manifest.shards > 1):
        found.fit.problems.append(
            f"sharded: {name} was saved in shards by {manifest.world_size} ranks, and this is another job: use "
            "load(step, state), which brings every shard to its place in a state"
        )
        return
    else:
        zeros = (0,) * len(shape)
        boxes, own = ((Box(zeros, shape, zeros),) if math.prod(shape) else ()), shape
    local = torch.empty(own, dtype=getattr(torch, entry.dtype))
    found.fit.tensors.append(WantedTensor(name, entry.dtype, shape, boxes, local, "fail"))


def _own_pieces(layout: LayoutEntry, manifest: Manifest, rank: int | None) -> tuple[Box, ...]:
    """What this rank held of a tensor that is joined of parts (`TensorSplit`): the pieces of its model shard, in their
    order along the dimension that they are cut in; none if this is another job, or has only one shard."""
    if rank is None or manifest.shards == 1:
        return ()
    mine = sorted(
        (piece for piece in layout.pieces if manifest.shard_of[piece.rank] == manifest.shard_of[rank]),
        key=lambda piece: piece.offsets,
    )
    at = [0] * len(mine[0].offsets) if mine else []
    cut = next((d for d in range(len(at)) if any(piece.offsets[d] != mine[0].offsets[d] for piece in mine)), 0)
    boxes = []
    for piece in mine:
        boxes.append(Box(piece.offsets, piece.lengths, tuple(at)))
        at[cut:] = [at[cut] + piece.lengths[cut], *at[cut + 1 :]] if at else []
    return tuple(boxes)


def _writer(manifest: Manifest, entry: TensorEntry, sharding: Sharding | None) -> int | None:
    """The rank that stored this rank's shard, in its own file; None if it lies in a file that ranks hold alike."""
    layout = manifest.layouts[entry.layout]
    if layout.mesh is None or layout.home not in OF_RANK:
        return None
    if sharding is None:  # the same everywhere
        mesh = manifest.meshes[layout.mesh]
        sharding = Sharding(mesh, layout.placements, mesh_coordinate(mesh, 0))
    return sharding.writer(entry.replica)


def _sharding(manifest: Manifest, entry: TensorEntry, at: Coordinates | None) -> Sharding | None:
    """How the tensor lay on this rank, if this is the same job and it was a DTensor."""
    layout = manifest.layouts[entry.layout]
    if at is None or layout.mesh is None:
        return None
    mesh = manifest.meshes[layout.mesh]
    coordinate = mesh_coordinate(mesh, mesh.ranks.index(at.rank))
    return Sharding(mesh, layout.placements, coordinate, given=layout.given)


def _is_cut(layout: LayoutEntry) -> bool:
    return any(placement != "R" for placement in layout.placements)
