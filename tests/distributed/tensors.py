"""States of bare tensors, placed in any way on any mesh, whose whole content every rank knows without asking."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import shardckpt as sc

DIMS = {1: ("dp",), 2: ("dp", "tp"), 3: ("replicate", "shard", "tp")}


@dataclass(frozen=True)
class Grid:
    """A mesh of ranks; its dimensions are called as in `DIMS`."""

    shape: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.shape)

    def mesh(self) -> DeviceMesh:
        """Called by all ranks of the job."""
        return init_device_mesh("cpu", self.shape, mesh_dim_names=DIMS[len(self.shape)])


@dataclass(frozen=True)
class Tensor:
    """A tensor as a whole; its content follows from its name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.lru_cache(maxsize=64)  # noqa: B019 - of values, that are compared by what they are
    def content(self) -> torch.Tensor:
        """Random bits: among floats also NaNs and zeros of both signs, which must come back as they were."""
        seed = hashlib.sha256(repr((self.name, self.shape, self.dtype)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        words = torch.randint(-(1 << 63), (1 << 63) - 1, (self.nbytes // 8 + 1,), generator=generator)
        raw = words.view(torch.uint8)[: self.nbytes].clone()
        return (raw % 2 if self.dtype == torch.bool else raw).view(self.dtype).reshape(self.shape)

    def blank(self) -> torch.Tensor:
        return torch.zeros(self.nbytes, dtype=torch.uint8).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Split:
    """How a tensor is spread over a grid: which of its dimensions each dimension of the grid cuts, and in what order.

    From left to right that is what `Shard` says; from right to left it is what FSDP2 leaves of a tensor that TP had
    sharded before, and DTensor says it by `_StridedShard`.
    """

    cuts: tuple[int | None, ...]
    """For each dimension of the grid a dimension of the tensor; None: copies."""
    from_the_right: bool = False
    on_tp_alone: bool = False
    """Placed on the "tp" part of the mesh, as TP without FSDP does it; there are only copies along the others."""

    def __str__(self) -> str:
        names = "".join("R" if cut is None else str(cut) for cut in self.cuts)
        return f"{'<' if self.from_the_right else ''}{names}{'t' if self.on_tp_alone else ''}"

    def placements(self, sizes: tuple[int, ...]) -> list[Placement]:
        found: list[Placement] = []
        for dim, cut in enumerate(self.cuts):
            earlier = [size for c, size in zip(self.cuts[dim + 1 :], sizes[dim + 1 :], strict=True) if c == cut]
            if cut is None:
                found.append(Replicate())
            elif self.from_the_right and math.prod(earlier) > 1:
                found.append(_StridedShard(cut, split_factor=math.prod(earlier)))
            else:
                found.append(Shard(cut))
        return found

    def local(self, whole: torch.Tensor, sizes: tuple[int, ...], coordinate: tuple[int, ...]) -> torch.Tensor:
        """A rank's part, as a view: `torch.chunk`, again and again."""
        steps = list(zip(self.cuts, sizes, coordinate, strict=True))
        for cut, size, index in reversed(steps) if self.from_the_right else steps:
            if cut is not None:
                chunks = torch.chunk(whole, size, cut)
                whole = chunks[index] if index < len(chunks) else whole.narrow(cut, 0, 0)
        return whole


@dataclass(frozen=True)
class Placed:
    """A tensor and how it lies on the mesh; no split: every rank has it as a plain tensor."""

    tensor: Tensor
    split: Split | None


def view_of(whole: torch.Tensor, split: Split | None, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part of a tensor that it has whole: a DTensor over a view, or the whole. Nothing is communicated."""
    if split is None:
        return whole
    sizes, coordinate = tuple(mesh.shape), tuple(mesh.get_coordinate() or ())
    local, placements = split.local(whole, sizes, coordinate), split.placements(sizes)
    if split.on_tp_alone:
        mesh, placements = mesh["tp"], placements[-1:]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def checkpoints(root: Path, mesh: DeviceMesh) -> sc.CheckpointManager:
    """The manager of this rank. Called by all ranks of the mesh."""
    return sc.CheckpointManager(root, sc.Gangs.from_mesh(mesh))


def save(root: Path, grid: Grid, placed: list[Placed], *, key: str = "model", step: int = 1) -> None:
    """On every rank of the grid."""
    mesh = grid.mesh()
    state = {key: {item.tensor.name: view_of(item.tensor.content(), item.split, mesh) for item in placed}}
    with checkpoints(root, mesh) as manager:
        manager.save(step, state).result()


def load(manager: sc.CheckpointManager, mesh: DeviceMesh, placed: list[Placed], *, key: str = "model") -> list[str]:
    """On every rank: load into blank tensors; gives those that are not what they were, or of which others changed."""
    wholes = {item.tensor.name: item.tensor.blank() for item in placed}
    state = {key: {item.tensor.name: view_of(wholes[item.tensor.name], item.split, mesh) for item in placed}}
    assert manager.resume(state) is not None
    at = (tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))
    wrong = []
    for item in placed:
        whole, content, split = wholes[item.tensor.name], item.tensor.content(), item.split
        mine, expected = (split.local(t, *at) if split is not None else t for t in (whole, content))
        if not same_bits(mine, expected):
            wrong.append(item.tensor.name)
        mine.zero_()
        if whole.contiguous().flatten().view(torch.uint8).any():
            wrong.append(f"{item.tensor.name}, outside of its part")
    return wrong
