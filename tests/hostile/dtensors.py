"""Files of `torch.save` in which the ranks of a mesh have their parts of a tensor, made in one process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardckpt.format.placement import shard_boxes

WHOLE = torch.arange(35.0).view(5, 7)


def part(whole: torch.Tensor, shape: tuple[int, ...], placements: tuple[Placement, ...], rank: int) -> DTensor:
    """What this rank of a mesh of that shape has of it."""
    count = int(torch.tensor(shape).prod())
    ranks = torch.arange(count).view(shape)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=tuple("abc")[: len(shape)], _init_backend=False, _rank=rank)
    boxes = shard_boxes(whole.shape, shape, [*map(text_of, placements)], mesh.get_coordinate() or ())
    local = whole.new_empty(_shape(boxes, whole.ndim))
    for box in boxes:
        source = tuple(slice(at, at + n) for at, n in zip(box.offsets, box.lengths, strict=True))
        target = tuple(slice(at, at + n) for at, n in zip(box.local, box.lengths, strict=True))
        local[target] = whole[source]
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    return DTensor(local, DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def _shape(boxes: Any, ndim: int) -> tuple[int, ...]:
    return tuple(max((box.local[d] + box.lengths[d] for box in boxes), default=0) for d in range(ndim))


def text_of(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"SS({placement.dim},{placement.split_factor})"
    return f"S({placement.dim})" if isinstance(placement, Shard) else "R"


def files(
    shape: tuple[int, ...] = (2, 2),
    placements: tuple[Placement, ...] = (Shard(0), Shard(1)),
    *,
    whole: torch.Tensor = WHOLE,
    **options: Any,
) -> Iterator[bytes]:
    """What each rank saved, with a tensor and a value that all have."""
    for rank in range(int(torch.tensor(shape).prod())):
        state = {"w": part(whole, shape, placements, rank), "t": torch.ones(3), "log": [0.5 * n for n in range(60)]}
        torch.save(state, buffer := io.BytesIO(), **options)
        yield buffer.getvalue()


PLACED: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows": ((4,), (Shard(0),)),
    "rows, of which the last has none": ((8,), (Shard(0),)),
    "columns": ((3,), (Shard(1),)),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "copies of columns": ((2, 2), (Replicate(), Shard(1))),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "rows, as FSDP2 after TP": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "all alike": ((2, 1), (Replicate(), Replicate())),
}
