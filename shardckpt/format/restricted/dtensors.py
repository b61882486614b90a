"""What a pickle says of a DTensor: which part of a whole tensor the local one is. Nothing of torch is made of it.

Sources, torch 2.13: `torch._utils._rebuild_wrapper_subclass`, `DTensorSpec`, `DeviceMesh.__getstate__`,
`torch.distributed._mesh_layout`. Meshes as earlier versions pickled them are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shardckpt.format.index import MAX_DIMS, as_size
from shardckpt.format.placement import Box, local_shape, shard_boxes
from shardckpt.format.restricted.allowed import Callee, Maker, Record, RecordKind

_PLACEMENTS = "torch.distributed.tensor.placement_types."


@dataclass(frozen=True, slots=True)
class WholeOf:
    """A whole tensor before it is known which part of it there is: what `_rebuild_wrapper_subclass` is called with."""

    dtype: Any
    shape: tuple[int, ...]


def _never(*_: Any) -> Any:
    raise ValueError("a DTensor is made in one way only")


DTENSOR = Callee(_never)
"""The class, which is only named."""


def _whole(kind: Any, dtype: Any, size: Any, *_: Any) -> WholeOf:
    """The arguments are those of `torch._utils._rebuild_wrapper_subclass`."""
    if kind is not DTENSOR or not isinstance(size, tuple) or len(size) > MAX_DIMS:
        raise ValueError("a tensor that wraps others, of a class of its own")
    return WholeOf(dtype, tuple([as_size(length) for length in size]))


REBUILD = Callee(_whole)


def _ignored(*_: Any) -> None:
    """What repeats what is known otherwise."""


def _sharded_by(dim: Any, mesh_dims: Any) -> tuple[Any, Any]:
    """A `ShardOrderEntry`."""
    return dim, mesh_dims


def dtensor_globals() -> dict[str, Any]:
    """What the pickle of a DTensor names."""
    kinds = {
        "torch.distributed.tensor._dtensor_spec.DTensorSpec": "spec",
        "torch.distributed.device_mesh.DeviceMesh": "mesh",
        "torch.distributed._mesh_layout._MeshLayout": "layout",
        "torch.distributed._mesh_layout._FlatLayout": "axis",
        f"{_PLACEMENTS}Shard": "Shard",
        f"{_PLACEMENTS}_StridedShard": "_StridedShard",
        f"{_PLACEMENTS}Replicate": "Replicate",
        f"{_PLACEMENTS}Partial": "Partial",
    }
    return {
        **{name: RecordKind(kind) for name, kind in kinds.items()},
        "torch.distributed.tensor.DTensor": DTENSOR,
        "torch._utils._rebuild_wrapper_subclass": REBUILD,
        "torch.distributed.tensor._dtensor_spec.TensorMeta": Maker(_ignored),
        "torch.distributed.tensor._dtensor_spec.ShardOrderEntry": Maker(_sharded_by),
    }


def boxes_of(whole: WholeOf, spec: Any, local: tuple[int, ...]) -> tuple[Box, ...]:
    """Where in the whole the local tensor (of this shape) belongs. `ValueError` for what is not well-formed, or cannot
    be told: partial sums, shards in an order of their own."""
    fields = _state(spec, "spec")
    mesh = _state(fields.get("mesh"), "mesh")
    sizes, coordinate = _mesh_sizes(mesh.get("_layout")), mesh.get("_coordinate_on_dim")
    given = fields.get("placements")
    if type(given) is not tuple or type(coordinate) is not tuple or not len(given) == len(sizes) == len(coordinate):
        raise ValueError("a DTensor whose placements are not those of its mesh")
    placements = [_placement(each) for each in given]
    _check_order(fields, placements)
    boxes = shard_boxes(whole.shape, sizes, placements, [as_size(index) for index in coordinate])
    if (local_shape(boxes, len(whole.shape)) if boxes else None) != (local if math.prod(local) else None):
        raise ValueError("a DTensor whose local tensor has not the shape that its placements say")
    return boxes


def _mesh_sizes(layout: Any) -> tuple[int, ...]:
    axes = _state(layout, "layout").get("axes")
    if type(axes) is not tuple or len(axes) > MAX_DIMS:
        raise ValueError("a mesh without dimensions")
    found: list[int] = []
    for axis in axes:
        shape = _state(axis, "axis").get("shape")
        if type(shape) is not tuple or len(shape) > MAX_DIMS:
            raise ValueError("a mesh without sizes")
        sizes: list[int] = [as_size(size) for size in shape]
        found.append(math.prod(sizes))
    return tuple(found)


def _placement(record: Any) -> str:
    """As the index of a file of ours spells it."""
    kind = record.kind if type(record) is Record else ""
    if kind == "Replicate":
        return "R"
    if kind not in ("Shard", "_StridedShard"):
        raise ValueError("a DTensor that is a sum still to be done, or is placed as is not known here")
    fields = _state(record, kind)
    dim = as_size(fields.get("dim"))
    return f"S({dim})" if kind == "Shard" else f"SS({dim},{as_size(fields.get('split_factor'))})"


def _check_order(fields: dict[Any, Any], placements: list[str]) -> None:
    """Several splits of one dimension are done from left to right, but for those that say otherwise by a factor."""
    order = fields.get("shard_order")
    if order is None or any(placement.startswith("SS") for placement in placements):
        return
    if type(order) is not tuple or not all(type(each) is tuple and len(each) == 2 for each in order):
        raise ValueError("a DTensor whose shards are in no order")
    for _, dims in order:
        if type(dims) is not tuple or [as_size(dim) for dim in dims] != sorted(dims):
            raise ValueError("a DTensor whose shards are in an order of their own: redistribute it, and save it again")


def _state(record: Any, kind: str) -> dict[Any, Any]:
    if type(record) is not Record or record.kind != kind or type(record.state) is not dict:
        raise ValueError(f"a DTensor without a {kind} that is known")
    return record.state
