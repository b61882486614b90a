"""A tensor's own placement, in terms that mean the same on every rank. Here DTensor is spoken."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.manifest import MeshEntry
from shardckpt.format.placement import Box, parse_placement, shard_boxes
from shardckpt.format.placement import local_shape as shape_of_boxes


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over a mesh, seen from the rank at `coordinate` of it."""

    mesh: MeshEntry
    placements: tuple[str, ...]
    coordinate: tuple[int, ...]
    assumed: bool = False
    """Whether it is taken to be replicated along a dimension of the mesh that the tensor itself knows nothing of."""
    given: tuple[str, ...] = ()
    """The dimensions of the mesh that the tensor itself knows of, if not all."""

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

    def is_everywhere(self, shape: tuple[int, ...]) -> bool:
        """Whether every rank of the mesh holds some of a tensor of this shape."""
        return _is_everywhere(shape, self.mesh.shape, self.placements)

    def is_alike_on(self, ranks: tuple[int, ...]) -> bool:
        """Whether these global ranks hold the same shard as each other. Ranks outside the mesh hold copies of it."""
        varying = _varying_dims(self.mesh, ranks)
        return all(self.placements[dim] == "R" for dim in varying)


def describe(name: str, tensor: torch.Tensor) -> Sharding | None:
    """The sharding of a DTensor; None for a tensor without one. `InvalidStateError` for pending (partial) sums."""
    if not isinstance(tensor, DTensor):
        return None
    placements = tuple(_placement(name, placement) for placement in tensor.placements)
    _check_order(name, getattr(tensor._spec, "shard_order", None) or (), placements)
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


def _check_order(name: str, order: Sequence[Any], placements: Sequence[str]) -> None:
    """2026-11, torch 2.13: a spec may say that mesh dimensions cut a tensor in another order than from left to right,
    which its placements do not tell. (Those of FSDP2 after TP do, by their split factors.)"""
    other = next((dims for _, dims in order if list(dims) != sorted(dims)), None)
    if other is not None and not any(placement.startswith("SS") for placement in placements):
        raise InvalidStateError(
            f"{name} was cut by the mesh's dimensions {other} in this order, which is not theirs; redistribute it first"
        )


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


@functools.lru_cache(maxsize=256)
def _is_everywhere(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[str, ...]) -> bool:
    places = (range(1 if p == "R" else size) for size, p in zip(mesh_shape, placements, strict=True))
    return all(shard_boxes(shape, mesh_shape, placements, place) for place in itertools.product(*places))


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
    known, key = _known_of(mesh), (placements, tuple(coordinate))
    if key not in known:
        known[key] = _described(mesh, whole, *key)
    return known[key]


_KNOWN: dict[int, tuple[weakref.ref[Any], dict[Any, Sharding]]] = {}


def _known_of(mesh: Any) -> dict[Any, Sharding]:
    """What has been described of this very mesh. To find it among equal ones (a slice made anew for each module is one)
    is a look at all of its ranks, for each tensor."""
    number = id(mesh)
    found = _KNOWN.get(number)
    if found is None or found[0]() is not mesh:
        found = _KNOWN[number] = (weakref.ref(mesh, lambda _: _KNOWN.pop(number, None)), {})
    return found[1]


def _root_of(mesh: Any) -> Any:
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    given, names = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    return root if given and tuple(name for name in names if name in given) == tuple(given) else mesh


@functools.lru_cache(maxsize=256)  # where this rank stands is no part of a mesh's hash, and may change in a process
def _described(mesh: Any, whole: Any, placements: tuple[str, ...], coordinate: tuple[int, ...]) -> Sharding:
    names = tuple(whole.mesh_dim_names or _names(whole.shape))
    given = dict(zip(mesh.mesh_dim_names or names, placements, strict=True))
    kept = [i for i, name in enumerate(names) if name in given or name != "pp"]
    grid = whole.mesh[tuple(slice(None) if i in kept else at for i, at in enumerate(coordinate))]
    entry = _entry(tuple(names[i] for i in kept), tuple(grid.shape), tuple(grid.flatten().tolist()))
    assumed = any(names[i] not in given and whole.shape[i] > 1 for i in kept)
    own = () if len(given) == len(kept) else tuple(names[i] for i in kept if names[i] in given)
    spread = tuple(given.get(names[i], "R") for i in kept)
    return Sharding(entry, spread, tuple(coordinate[i] for i in kept), assumed, own)


@functools.lru_cache(maxsize=64)
def _entry(dims: tuple[str, ...], shape: tuple[int, ...], ranks: tuple[int, ...]) -> MeshEntry:
    """One object for one mesh, however tensors lie on it: to compare those of two is a look at all ranks."""
    return MeshEntry(dims, shape, ranks)


def _names(dims: Sequence[object]) -> tuple[str, ...]:
    """What the dimensions of a mesh are called that has no names for them."""
    return tuple(f"dim{i}" for i in range(len(dims)))


def local_shape(sharding: Sharding, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a rank holds of a tensor of this (global) shape."""
    boxes = sharding.boxes(shape)
    if boxes:
        return shape_of_boxes(boxes, len(shape))
    cut = {parsed[0] for placement in sharding.placements if (parsed := parse_placement(placement))}
    return tuple(0 if dim in cut else size for dim, size in enumerate(shape))


def as_dtensor(local: torch.Tensor, sharding: Sharding, shape: tuple[int, ...]) -> torch.Tensor:
    """A DTensor again, of this rank's part, on a mesh that equals the one that it was saved from.

    The mesh has the groups of the training that are made of the same ranks, and makes none. An optimizer keeps such a
    tensor as it is, so that it must be good for whatever is done with it later. Where the training has no such group
    it can only be copied (`model.load_state_dict`), or asked for its local part. Without an initialised
    `torch.distributed` the part is given back as it is, which is right where it is the whole. Called on the
    training's thread.
    """
    if not dist.is_initialized():
        return local
    mesh = _mesh(sharding.mesh, sharding.given)
    names = sharding.given or sharding.mesh.dims
    spread = dict(zip(sharding.mesh.dims, sharding.placements, strict=True))
    placements = [_read_placement(spread[name]) for name in names]
    stride = torch.empty(shape, device="meta").stride()
    size = torch.Size(shape)
    whole: torch.Tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)
    return whole


def _mesh(entry: MeshEntry, given: tuple[str, ...]) -> DeviceMesh:
    kind = "cuda" if "nccl" in dist.get_backend() else "cpu"
    grid = torch.tensor(entry.ranks, dtype=torch.int).view(entry.shape)
    names = None if entry.dims == _names(entry.dims) else entry.dims
    groups = _groups(entry)
    if len(groups) == 1 == len(entry.dims):
        mesh = DeviceMesh.from_group(groups[0], kind, grid, mesh_dim_names=names)
    elif groups and names is not None:
        mesh = DeviceMesh.from_group(groups, kind, grid, mesh_dim_names=names)
    else:
        mesh = DeviceMesh(kind, grid, mesh_dim_names=names, _init_backend=False)
        if not hasattr(mesh, "_dim_group_names"):  # 2026-11, torch 2.13: slicing looks the names of the groups up
            groupless: Any = mesh
            groupless._dim_group_names = [f"none{dim}" for dim in range(mesh.ndim)]
    return mesh[given] if given else mesh


def _groups(entry: MeshEntry) -> list[Any]:
    """The training's group along each dimension of the mesh, seen from this rank; none if one is not there.

    Of several groups of the same ranks the one that was made first: the same on all ranks, which make them in one
    order.
    """
    rank = dist.get_rank()
    if rank not in entry.ranks:
        return []
    groups: dict[tuple[int, ...], Any] = {}
    for group in dist.distributed_c10d._world.pg_map:  # 2026-11: torch has no public list of them
        groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    places = {mesh_coordinate(entry, position): member for position, member in enumerate(entry.ranks)}
    at = mesh_coordinate(entry, entry.ranks.index(rank))
    along = [[(*at[:dim], i, *at[dim + 1 :]) for i in range(size)] for dim, size in enumerate(entry.shape)]
    lines = [tuple(places[place] for place in line) for line in along]
    return [groups[line] for line in lines] if all(line in groups for line in lines) else []


def _read_placement(text: str) -> Any:
    parsed = parse_placement(text)
    if parsed is None:
        return Replicate()
    dim, factor = parsed
    return Shard(dim) if text.startswith("S(") else _StridedShard(dim, split_factor=factor)


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
