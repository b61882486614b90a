"""A tensor's own placement, in terms that mean the same on every rank. Here DTensor is spoken."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardckpt.errors import InvalidStateError
from shardckpt.format.manifest import MeshEntry
from shardckpt.format.placement import Box, shard_boxes


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over a mesh, seen from the rank at `coordinate` of it."""

    mesh: MeshEntry
    placements: tuple[str, ...]
    coordinate: tuple[int, ...]

    def boxes(self, shape: tuple[int, ...]) -> tuple[Box, ...]:
        """What this rank holds of a tensor of this (global) shape."""
        return shard_boxes(shape, self.mesh.shape, self.placements, self.coordinate)

    @property
    def replicas(self) -> int:
        """How many ranks hold each shard."""
        return replica_count(self.mesh.shape, self.placements)

    @property
    def replica(self) -> int:
        """The number of this rank among those that hold the same shard: 0 .. replicas - 1."""
        return replica_number(self.mesh.shape, self.placements, self.coordinate)

    def is_alike_on(self, ranks: tuple[int, ...]) -> bool:
        """Whether these global ranks hold the same shard as each other. Ranks outside the mesh hold copies of it."""
        varying = _varying_dims(self.mesh, ranks)
        return all(self.placements[dim] == "R" for dim in varying)


def describe(name: str, tensor: torch.Tensor) -> Sharding | None:
    """The sharding of a DTensor; None for a tensor without one. `InvalidStateError` for pending (partial) sums."""
    if not isinstance(tensor, DTensor):
        return None
    placements = tuple(_placement(name, placement) for placement in tensor.placements)
    return _over_root(tensor.device_mesh, placements)


def replica_count(mesh_shape: tuple[int, ...], placements: tuple[str, ...]) -> int:
    count = 1
    for size, placement in zip(mesh_shape, placements, strict=True):
        count *= size if placement == "R" else 1
    return count


def replica_number(mesh_shape: tuple[int, ...], placements: tuple[str, ...], coordinate: tuple[int, ...]) -> int:
    number = 0
    for size, placement, index in zip(mesh_shape, placements, coordinate, strict=True):
        number = number * size + index if placement == "R" else number
    return number


def mesh_coordinate(mesh: MeshEntry, position: int) -> tuple[int, ...]:
    """The coordinate of the rank at a row-major position of the mesh."""
    coordinate = []
    for size in reversed(mesh.shape):
        position, index = divmod(position, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))


@functools.lru_cache(maxsize=64)
def _varying_dims(mesh: MeshEntry, ranks: tuple[int, ...]) -> tuple[int, ...]:
    positions = {rank: i for i, rank in enumerate(mesh.ranks)}
    coordinates = {mesh_coordinate(mesh, positions[rank]) for rank in ranks if rank in positions}
    return tuple(dim for dim in range(len(mesh.shape)) if len({c[dim] for c in coordinates}) > 1)


def _over_root(mesh: Any, placements: tuple[str, ...]) -> Sharding:
    """The sharding over the root mesh, where there is one: sub-meshes of different ranks then have one description.

    A tensor on the "tp" dimension of a (dp, tp) mesh is replicated over "dp". Only along "pp" there are no copies:
    other stages have other tensors. A flattened dimension is no dimension of the root; such a mesh is taken as it is.
    """
    whole = _root_of(mesh)
    coordinate = whole.get_coordinate()
    if coordinate is None:
        raise InvalidStateError("a DTensor whose mesh does not contain this rank cannot be stored by it")
    return _described(mesh, whole, placements, tuple(coordinate))


def _root_of(mesh: Any) -> Any:
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    given, names = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    return root if given and tuple(name for name in names if name in given) == tuple(given) else mesh


@functools.lru_cache(maxsize=256)  # where this rank stands is no part of a mesh's hash, and may change in a process
def _described(mesh: Any, whole: Any, placements: tuple[str, ...], coordinate: tuple[int, ...]) -> Sharding:
    names = tuple(whole.mesh_dim_names or (f"dim{i}" for i in range(whole.ndim)))
    given = dict(zip(mesh.mesh_dim_names or names, placements, strict=True))
    kept = [i for i, name in enumerate(names) if name in given or name != "pp"]
    grid = whole.mesh[tuple(slice(None) if i in kept else at for i, at in enumerate(coordinate))]
    entry = MeshEntry(tuple(names[i] for i in kept), tuple(grid.shape), tuple(grid.flatten().tolist()))
    return Sharding(entry, tuple(given.get(names[i], "R") for i in kept), tuple(coordinate[i] for i in kept))


def _placement(name: str, placement: Any) -> str:
    if isinstance(placement, Replicate):
        return "R"
    factor = getattr(placement, "split_factor", None)
    dim = getattr(placement, "dim", None)
    if factor is not None and dim is not None:
        return f"SS({dim},{factor})"
    if isinstance(placement, Shard):
        return f"S({placement.dim})"
    raise InvalidStateError(f"{name} has placement {placement}, a sum still to be done: redistribute it first")
