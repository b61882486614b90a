"""A tensor's own placement, in terms that mean the same on every rank. Here DTensor is spoken."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.manifest import MeshEntry
from shardckpt.format.placement import Box, shard_boxes


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over a mesh, seen from the rank at `coordinate` of it."""

    mesh: MeshEntry
    placements: tuple[str, ...]
    coordinate: tuple[int, ...]
    assumed: bool = False
    """Whether it is taken to be replicated along a dimension of the mesh that the tensor itself knows nothing of."""

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

    def writer(self, replica: int) -> int:
        """The global rank that holds the same shard as this rank and is the replica of that number."""
        coordinate = list(self.coordinate)
        for dim in reversed([dim for dim, placement in enumerate(self.placements) if placement == "R"]):
            replica, coordinate[dim] = divmod(replica, self.mesh.shape[dim])
        position = 0
        for size, index in zip(self.mesh.shape, coordinate, strict=True):
            position = position * size + index
        return self.mesh.ranks[position]

    def is_alike_on(self, ranks: tuple[int, ...]) -> bool:
        """Whether these global ranks hold the same shard as each other. Ranks outside the mesh hold copies of it."""
        varying = _varying_dims(self.mesh, ranks)
        return all(self.placements[dim] == "R" for dim in varying)


def describe(name: str, tensor: torch.Tensor) -> Sharding | None:
    """The sharding of a DTensor; None for a tensor without one. `InvalidStateError` for pending (partial) sums."""
    if not isinstance(tensor, DTensor):
        return None
    placements = tuple(_placement(name, placement) for placement in tensor.placements)
    sharding = _over_root(tensor.device_mesh, placements)
    # Of an empty shard nothing is stored, so that there is nothing that copies could be compared with.
    return sharding if tensor._local_tensor.numel() else replace(sharding, assumed=False)


def check_tensor(name: str, tensor: torch.Tensor) -> str:
    """The dtype's name of a tensor that can be stored; else `InvalidStateError` naming the key."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, DTensor) or isinstance(tensor, torch.nn.Buffer)
    dtype = str(tensor.dtype).removeprefix("torch.")
    problem = ""
    if not plain and not isinstance(tensor, torch.nn.Parameter):
        problem = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}; store the plain tensors it is made of"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"has layout {tensor.layout}; store its dense form or its indices and values"
    elif tensor.is_meta:
        problem = "is on the meta device and has no data; materialise the model first"
    elif dtype not in ITEMSIZE:
        problem = f"has dtype {dtype}, which has no plain bytes; store its dequantised form"
    if problem:
        raise InvalidStateError(f"{name} cannot be stored: it {problem}")
    return dtype


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
    assumed = any(names[i] not in given and whole.shape[i] > 1 for i in kept)
    return Sharding(entry, tuple(given.get(names[i], "R") for i in kept), tuple(coordinate[i] for i in kept), assumed)


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
