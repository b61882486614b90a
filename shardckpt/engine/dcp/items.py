"""From DCP's write items to one file: what this rank holds, and what it writes, nested as in the caller's state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from shardckpt.engine.dcp.exchange import Keys, WrittenBox
from shardckpt.engine.saving.draft import PlannedRecord
from shardckpt.engine.saving.plan import FilePlan
from shardckpt.engine.sharding import check_tensor
from shardckpt.errors import InvalidStateError
from shardckpt.format.checksum import value_digest
from shardckpt.format.index import ITEMSIZE, StoredBox
from shardckpt.format.layout import rank_file
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, UnsafeValueError, check_value, map_leaves, spell_tree
from shardckpt.state import Path


@dataclass(frozen=True, slots=True)
class OwnItems:
    """This rank's local plan, before DCP leaves to one rank what several hold.

    Which it does by name alone: of Python values that differ between ranks all but one would be lost. So every rank
    writes all of its values; and of tensors that are not sharded it sums up those that another rank writes.
    """

    values: tuple[WriteItem, ...]
    unsharded: tuple[WriteItem, ...]
    paths: Mapping[str, Path]
    """By flat name, where the key is in the caller's state."""
    keys: Keys


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into this rank's file, and what it holds besides."""

    file: FilePlan
    boxes: tuple[WrittenBox, ...]
    values: Mapping[str, str]
    """A digest of each."""
    held: tuple[tuple[str, torch.Tensor], ...]
    """Tensors that are not sharded and that another rank writes."""


def own_items(plan: SavePlan) -> OwnItems:
    """What a local plan says of this rank, from a planner that says at least that."""
    values = tuple(item for item in plan.items if item.type == WriteItemType.BYTE_IO)
    tensors = dict.fromkeys(item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO)
    unsharded = tuple(item for item in plan.items if item.type == WriteItemType.TENSOR)
    keys = Keys(tuple(tensors), tuple(item.index.fqn for item in values))
    return OwnItems(values, unsharded, _paths(plan.planner_data), keys)


def collect(plan: SavePlan, planner: SavePlanner, own: OwnItems, *, rank: int) -> Content:
    """Resolve the items of the final plan. `InvalidStateError` names a key that cannot be stored.

    All tensors are resolved at once: a planner that makes new ones must have the memory for this rank's share.
    """
    draft = _Draft(planner)
    values = {item.index.fqn: item for item in (*own.values, *plan.items) if item.type == WriteItemType.BYTE_IO}
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            draft.add_tensor(item)
    for item in values.values():
        draft.add_value(item)
    tree = spell_tree(_nest(draft.leaves, own.paths))
    file = FilePlan(rank_file(rank), "rank", tuple(draft.records), tuple(draft.boxes), tree)
    written = {item.index for item in plan.items}
    held = [item for item in own.unsharded if item.index not in written]
    return Content(
        file,
        tuple(draft.written),
        {name: value_digest(draft.leaves[name]) for name in values},
        tuple((item.index.fqn, draft.resolve(item)[0]) for item in held),
    )


@dataclass(slots=True)
class _Draft:
    """A file as it fills up."""

    planner: SavePlanner
    records: list[PlannedRecord] = field(default_factory=list)
    boxes: list[StoredBox] = field(default_factory=list)
    written: list[WrittenBox] = field(default_factory=list)
    leaves: dict[str, Any] = field(default_factory=dict)
    known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def resolve(self, item: WriteItem) -> tuple[torch.Tensor, str]:
        """The tensor of an item, and the name of its dtype; checked against what the plan says of it."""
        name, planned = item.index.fqn, item.tensor_data
        tensor = self.planner.resolve_data(item)
        if planned is None or not isinstance(tensor, torch.Tensor):
            raise InvalidStateError(f"{name}: the planner gives {type(tensor).__name__} where it planned a tensor")
        dtype = check_tensor(name, tensor)
        if tensor.shape != planned.chunk.sizes or tensor.dtype != planned.properties.dtype:
            raise InvalidStateError(
                f"{name}: DCP planned {planned.properties.dtype} {list(planned.chunk.sizes)} at "
                f"{list(planned.chunk.offsets)} for this rank, but it holds {tensor.dtype} {list(tensor.shape)}: "
                "torch does not describe this placement, or a planner changes tensors and does not say so"
            )
        return tensor.detach(), dtype

    def add_tensor(self, item: WriteItem) -> None:
        tensor, dtype = self.resolve(item)
        assert item.tensor_data is not None
        name, shape = item.index.fqn, tuple(item.tensor_data.size)
        offsets, lengths = tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)
        number = self._record_number(tensor, dtype)
        if all(lengths) or not all(shape):  # an empty share of a tensor that is not empty is no part of it
            self.boxes.append(StoredBox(name, number, shape, Box(offsets, lengths, (0,) * len(shape))))
            self.written.append(WrittenBox(name, dtype, shape, offsets, lengths))
        leaf = TensorRef(number, tensor.dtype, lengths)
        if name in self.leaves:  # several shards of one tensor
            earlier = self.leaves[name]
            leaf = [*(earlier if isinstance(earlier, list) else [earlier]), leaf]  # type: ignore[assignment]
        self.leaves[name] = leaf

    def add_value(self, item: WriteItem) -> None:
        """Planners hand in what `torch.save` wrote; what `weights_only` makes of it is stored."""
        name = item.index.fqn
        try:
            stream = self.planner.resolve_data(item)
            if not isinstance(stream, io.BytesIO):
                raise UnsafeValueError(f"the planner gives {type(stream).__name__} where it planned a value")
            stream.seek(0)
            value = torch.load(stream, map_location="cpu", weights_only=True)
            _check_undivided(value)
            check_value(value)
        except UnsafeValueError as error:
            raise InvalidStateError(f"{name}: {error}") from error
        except Exception as error:  # of any kind: torch lets them escape
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidStateError(
                f"{name} cannot be stored, because loading it back would need to run code ({reason}); "
                "store numbers, strings, tensors, lists, tuples and dicts"
            ) from error
        self.leaves[name] = value

    def _record_number(self, tensor: torch.Tensor, dtype: str) -> int:
        """The record of this tensor: that of an earlier one with the very same memory (tied), else a new one."""
        nbytes = tensor.numel() * ITEMSIZE[dtype]
        memory = (tensor.device, tensor.data_ptr(), dtype, tuple(tensor.shape), tensor.stride())
        number = self.known.get(memory) if nbytes else None
        if number is None:
            number = self.known[memory] = len(self.records)
            self.records.append(PlannedRecord(tensor, dtype, tuple(tensor.shape), nbytes))
        return number


def _check_undivided(value: Any) -> None:
    """Refuse what DCP takes for one value and everything else here for several: a tuple with dicts in it."""
    paths: list[Path] = []
    map_leaves(value, lambda path, _: paths.append(path))
    if paths != [()]:
        raise UnsafeValueError(
            "it holds dicts or tensors where DCP does not look for them: use lists instead of tuples, and a planner "
            "with flatten_state_dict=True"
        )


def _paths(planner_data: Any) -> Mapping[str, Path]:
    """What `DefaultSavePlanner` puts into its plans; other planners may put anything there: then names stay flat."""
    if not isinstance(planner_data, Mapping) or not all(isinstance(path, tuple) for path in planner_data.values()):
        return {}
    return planner_data


_GONE = object()


def _nest(leaves: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The leaves at their paths; of a list that other ranks' leaves belong to as well, their places are None."""
    names = dict.fromkeys((*paths, *leaves))
    flat = {name: leaves.get(name, _GONE) for name in names}
    nested = unflatten_state_dict(flat, {name: paths.get(name, (name,)) for name in names})
    return {key: node for key, value in nested.items() if (node := _prune(value)) is not _GONE}


def _prune(node: Any) -> Any:
    if type(node) is dict:
        kept = {key: pruned for key, item in node.items() if (pruned := _prune(item)) is not _GONE}
        return kept if kept or not node else _GONE
    if type(node) is list:
        items = [_prune(item) for item in node]
        if items and all(item is _GONE for item in items):
            return _GONE
        return [None if item is _GONE else item for item in items]
    return node
