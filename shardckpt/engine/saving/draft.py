"""A file of a save as it fills up: its records, each memory once, and the part of the state's nesting that it owns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from shardckpt.errors import InvalidStateError
from shardckpt.format.checksum import value_digest
from shardckpt.format.index import ITEMSIZE, StoredBox
from shardckpt.format.tree import UnsafeValueError, check_value, spell_value
from shardckpt.state import Path


class PlannedRecord(NamedTuple):
    """A tensor of this rank that becomes one record: `tensor` is local (never a DTensor), not yet copied."""

    tensor: torch.Tensor
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(slots=True)
class Draft:
    """A file as it fills up."""

    records: list[PlannedRecord] = field(default_factory=list)
    boxes: list[StoredBox] = field(default_factory=list)
    known: dict[tuple[Any, ...], int] = field(default_factory=dict)
    leaves: dict[Path, Any] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)
    """Keys of the Python values; `leaves` has a `ValueRef` with the position here."""
    spelled: list[bytes] = field(default_factory=list)
    """The values."""


def record_number(draft: Draft, local: torch.Tensor, dtype: str) -> int:
    """The record of this tensor: that of an earlier one with the very same memory (tied), else a new one."""
    nbytes = local.numel() * ITEMSIZE[dtype]
    memory = memory_of(local, dtype)
    number = draft.known.get(memory) if nbytes else None
    if number is None:
        number = draft.known[memory] = len(draft.records)
        draft.records.append(PlannedRecord(local.detach(), dtype, tuple(local.shape), nbytes))
    return number


def memory_of(local: torch.Tensor, dtype: str) -> tuple[Any, ...]:
    """What tied tensors have in common."""
    place = local.device, local.data_ptr(), dtype
    return *place, tuple(local.shape), local.stride(), local.is_conj(), local.is_neg()


class Turns:
    """Shares the writing of what several ranks hold alike: each time whoever has had the least to do so far.

    Tied tensors all go where the first of them goes, so that one file has their bytes, once, and says that it does.
    """

    def __init__(self) -> None:
        self._load: dict[Hashable, list[int]] = {}
        self._chosen: dict[Hashable, int] = {}

    def is_tied(self, kind: Hashable, memory: Hashable | None) -> bool:
        """Whether there was one of the same memory before."""
        return (kind, memory) in self._chosen

    def choose(self, kind: Hashable, copies: int, nbytes: int, memory: Hashable | None) -> int:
        """Which of the copies is written, of a tensor of that `kind`: those of one kind have the same holders."""
        chosen = None if memory is None else self._chosen.get((kind, memory))
        if chosen is None:
            load = self._load.setdefault(kind, [0] * copies)
            chosen = load.index(min(load))
            load[chosen] += nbytes
            if memory is not None:
                self._chosen[kind, memory] = chosen
        return chosen


_GONE = object()


def prune(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """The tree with the leaves that a file owns; dicts that become empty go, places in lists become None."""

    def walk(node: Any, path: Path) -> Any:
        if path in leaves:
            return leaves[path]
        if isinstance(node, dict) or hasattr(node, "keys"):
            kept = {key: walk(item, (*path, key)) for key, item in node.items()}
            return {key: item for key, item in kept.items() if item is not _GONE} or _GONE
        if type(node) in (list, tuple):
            items = [walk(item, (*path, i)) for i, item in enumerate(node)]
            if all(item is _GONE for item in items):
                return _GONE
            return type(node)(None if item is _GONE else item for item in items)
        return _GONE

    pruned = walk(tree, ())
    return {} if pruned is _GONE else pruned


def take_value(name: str, value: Any) -> tuple[bytes, str]:
    """A Python value as it is now, spelled, and its digest. `InvalidStateError` for one that cannot be stored."""
    try:
        check_value(value)
        return spell_value(value), value_digest(value)
    except UnsafeValueError as error:
        raise InvalidStateError(f"{name}: {error}") from error
