"""The same state again: most saves of a run are of the same tensors in the same places, and planned already.

What a plan depends on is looked at in one pass, about a microsecond a tensor: the nesting, and of each tensor its type,
dtype, shape and placements, and which are tied. If all of it is as it was, only the tensors themselves and the Python
values are put into the plan of the last save. No tensor is held from one save to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.saving.draft import PlannedRecord, take_value
from shardckpt.engine.saving.plan import FilePlan, SavePlan, plan_save
from shardckpt.format.tree import MAX_LEVELS, SpelledTree, is_branch
from shardckpt.state import Part, join_path

_AT_ONCE = (type(None), bool, int, float, str, bytes)
"""Values that can be compared with what they were at no cost, and kept."""


class Planner:
    """Plans the saves of one run. Called on the training's thread of every rank, which decides alone."""

    def __init__(self, coordinates: Coordinates) -> None:
        self._at = coordinates
        self._known: _Known | None = None

    def plan(
        self,
        parts: Sequence[Part],
        *,
        model_key: str = "model",
        replicated: Collection[str] = (),
        frozen: Collection[str] = (),
    ) -> SavePlan:
        """As `plan_save`, and the same plan."""
        terms = (model_key, frozenset(replicated), frozenset(frozen))
        seen = _look_at(parts)
        known = self._known
        if known is not None and known.terms == terms and known.is_of(seen):
            return known.again(seen)
        self._known = None
        plan = plan_save(parts, self._at, model_key=model_key, replicated=replicated, frozen=frozen)
        if seen.is_known:
            self._known = _Known.of(plan, terms, seen)
        return plan


@dataclass(slots=True)
class _Seen:
    """A state, leaf by leaf in its order."""

    keys: list[Any] = field(default_factory=list)
    """The nesting: keys of parts and dicts, how many items each container has, and what kind it is."""
    tensors: list[torch.Tensor] = field(default_factory=list)
    """Those of this rank: never DTensors."""
    marks: list[Any] = field(default_factory=list)
    """What the plan of each tensor depends on, one after the other: a list for each would be work for the collector."""
    places: list[int] = field(default_factory=list)
    """Where each tensor lies in memory."""
    is_known: bool = True
    """Whether it is all that. What cannot be planned is looked at no further."""
    values: list[Any] = field(default_factory=list)
    tensor_names: list[tuple[Any, ...]] = field(default_factory=list)
    value_names: list[tuple[Any, ...]] = field(default_factory=list)


def _look_at(parts: Sequence[Part]) -> _Seen:
    seen = _Seen()
    for part in parts:
        seen.keys += (part.path, part.kind, part.rules)
        _look(seen, part.tree, part.path)
    return seen


def _look(seen: _Seen, node: Any, path: tuple[Any, ...]) -> None:
    """In the order of `map_leaves`."""
    if len(path) > MAX_LEVELS:
        seen.is_known = False
    elif isinstance(node, torch.Tensor):
        kind = type(node)
        is_plain = kind is torch.Tensor or kind is torch.nn.Parameter
        if is_plain or not isinstance(node, DTensor):  # to ask the latter takes longer
            spec, local = None, node
        else:
            spec, local = node._spec, node._local_tensor
        seen.tensors.append(local)
        seen.tensor_names.append(path)
        try:
            place, shape, stride, dtype = local.data_ptr(), local.size(), local.stride(), local.dtype
        except RuntimeError:  # sparse, nested, of MKL-DNN: plain tensors tell so at no cost, others are asked
            seen.is_known = False
            return
        if not is_plain and (local.layout is not torch.strided or local.is_nested):
            seen.is_known = False
        elif seen.is_known:
            is_conj = dtype.is_complex and local.is_conj()
            seen.places.append(place)
            seen.marks += (kind, spec, dtype, shape, stride, local.device, is_conj, local.is_neg())
    elif is_branch(node):
        seen.keys.append((type(node), len(node)))
        for key, item in node.items() if hasattr(node, "keys") else enumerate(node):
            seen.keys.append(key)
            _look(seen, item, (*path, key))
    else:
        seen.keys.append(None)
        seen.values.append(node)
        seen.value_names.append(path)


def _terms(local: torch.Tensor) -> tuple[Any, ...]:
    """What makes two tensors of the same memory one record."""
    dtype = local.dtype
    return dtype, local.shape, local.stride(), local.device, dtype.is_complex and local.is_conj(), local.is_neg()


def _memory(local: torch.Tensor) -> tuple[Any, ...]:
    return local.data_ptr(), *_terms(local)


def _ties(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor the number of the first that is the very same memory. Those without elements are never that."""
    first: dict[Any, int] = {}
    return [
        first.setdefault(_memory(tensor) if tensor.numel() else number, number) for number, tensor in enumerate(tensors)
    ]


@dataclass(slots=True)
class _Known:
    """The last plan without its tensors, and where among the leaves of a state they are."""

    terms: Hashable
    keys: list[Any]
    marks: list[Any]
    plan: SavePlan
    records: list[list[tuple[int, str, tuple[int, ...], int]]]
    """By file: the leaf, dtype, shape and bytes of each record."""
    alike: dict[str, list[tuple[str, int]]]
    memory: list[int]
    ties: list[int]
    values: list[Any]
    """As they were, where they are not larger than what stands for them."""
    taken: list[tuple[bytes, str]]
    names: list[str]
    places: list[list[int]]
    """By file: which of all values are in it."""

    @classmethod
    def of(cls, plan: SavePlan, terms: Hashable, seen: _Seen) -> _Known:
        first: dict[Any, int] = {}
        for number, tensor in enumerate(seen.tensors):
            first.setdefault(_memory(tensor), number)
        leaf_of = {join_path(path): number for number, path in enumerate(seen.tensor_names)}
        names = [join_path(path) for path in seen.value_names]
        spelled = {name: text for file in plan.files for name, text in zip(file.values, file.tree.values, strict=True)}
        place_of = {name: number for number, name in enumerate(names)}
        return cls(
            terms,
            seen.keys,
            seen.marks,
            replace(plan, files=tuple(replace(file, records=()) for file in plan.files), alike={}),
            [[(first[_memory(r.tensor)], *r[1:]) for r in file.records] for file in plan.files],
            {group: [(name, leaf_of[name]) for name, _ in those] for group, those in plan.alike.items()},
            seen.places,
            _ties(seen.tensors),
            [value if type(value) in _AT_ONCE else _NEVER for value in seen.values],
            [(spelled[name], plan.values[name]) for name in names],
            names,
            [[place_of[name] for name in file.values] for file in plan.files],
        )

    def is_of(self, seen: _Seen) -> bool:
        """Whether the plan is one of this state, too. Tensors may lie elsewhere now, if the same ones are tied."""
        if not seen.is_known or (self.keys, self.marks) != (seen.keys, seen.marks):
            return False
        if self.memory != seen.places:
            if self.ties != _ties(seen.tensors):
                return False
            self.memory = seen.places
        return True

    def again(self, seen: _Seen) -> SavePlan:
        for number, value in enumerate(seen.values):
            was = self.values[number]
            if type(value) is not type(was) or (value is not was and repr(value) != repr(was)):
                self.taken[number] = take_value(self.names[number], value)
                self.values[number] = value if type(value) in _AT_ONCE else _NEVER
        tensors = [tensor.detach() if tensor.requires_grad else tensor for tensor in seen.tensors]
        rows = zip(self.plan.files, self.records, self.places, strict=True)
        return replace(
            self.plan,
            files=tuple([self._file(*row, tensors) for row in rows]),
            values={name: digest for name, (_, digest) in zip(self.names, self.taken, strict=True)},
            alike={
                group: tuple([(name, tensors[leaf]) for name, leaf in those]) for group, those in self.alike.items()
            },
        )

    def _file(
        self,
        file: FilePlan,
        records: list[tuple[int, str, tuple[int, ...], int]],
        places: list[int],
        tensors: list[torch.Tensor],
    ) -> FilePlan:
        own = tuple([PlannedRecord(tensors[leaf], dtype, shape, nbytes) for leaf, dtype, shape, nbytes in records])
        tree = SpelledTree(file.tree.pieces, tuple([self.taken[place][0] for place in places]))
        return replace(file, records=own, tree=tree)


_NEVER = object()
"""No value is of its type."""
