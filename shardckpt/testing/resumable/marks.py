"""A digest of everything that a state holds, so that states of different processes can be compared key by key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardckpt.format.checksum import value_digest
from shardckpt.format.tree import map_leaves
from shardckpt.state import StateReader, join_path

Marks = Mapping[str, str]
"""A digest by key, in the order of the state."""


def marks_of(state: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a state. Called by all ranks of the training: DTensors are gathered over their meshes."""
    marks: dict[str, str] = {}

    def mark(path: tuple[Any, ...], leaf: Any) -> None:
        marks[join_path(path)] = _of_tensor(leaf) if isinstance(leaf, torch.Tensor) else value_digest(leaf)

    for part in StateReader().take_apart(state):
        map_leaves(part.tree, mark, part.path)
    return marks


def _of_tensor(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    raw = whole.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)} ".encode())
    digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def first_difference(one: Marks, other: Marks) -> str | None:
    """The first key, in the order of `one`, that the two do not have alike; None if there is none."""
    for key, digest in one.items():
        if other.get(key) != digest:
            return key if key in other else f"{key} (which is not there at all)"
    return next((f"{key} (which was not there before)" for key in other if key not in one), None)


def alike(marks: list[Marks]) -> dict[str, str]:
    """What all ranks that hold a key hold alike: all that can be compared with ranks of another number."""
    joined: dict[str, set[str]] = {}
    for own in marks:
        for key, digest in own.items():
            joined.setdefault(key, set()).add(digest)
    return {key: next(iter(digests)) for key, digests in joined.items() if len(digests) == 1}
