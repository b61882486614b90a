"""The nested state of the consolidated file, from what one rank of each kind notes of its own. On rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shardckpt.engine.consolidated.assembling.whole import WholeTensor
from shardckpt.format.index import StoredBox
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, decode_tree, map_leaves
from shardckpt.state import Path, join_path

Notes = Mapping[str, Any]
"""{"state": the nested state with a meta tensor for each tensor, "ties": names of tied entries to the first of each}"""


def read_notes(content: bytes) -> Notes:
    """Notes again; `ValueError` for what does not parse."""
    notes = decode_tree(content)
    if not isinstance(notes, dict) or notes.keys() != {"state", "ties"}:
        raise ValueError("these are not the notes of a rank")
    return notes


class Contents:
    """Which record stands at which place: the tree and the boxes of an archive of these tensors, one record each."""

    def __init__(self, notes: Sequence[Notes], tensors: Sequence[WholeTensor], model_key: str) -> None:
        """Of an entry that several notes have, the first says what it is."""
        self._tensors = tensors
        self._numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
        self._ties = {name: first for each in reversed(notes) for name, first in each["ties"].items()}
        self.boxes: list[StoredBox] = []
        state = {key: entry for each in reversed(notes) for key, entry in each["state"].items()}
        order = dict.fromkeys(key for each in notes for key in each["state"])
        nested = map_leaves({key: state[key] for key in order}, self._visit, (model_key,)) if order else {}
        self.tree = {model_key: nested, "model_key": model_key}

    def _visit(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name = join_path(path)
        number = self._numbers[name if name in self._numbers else self._ties[name]]
        shape, zeros = self._tensors[number].shape, (0,) * len(self._tensors[number].shape)
        self.boxes.append(StoredBox(name, number, shape, Box(zeros, shape, zeros)))
        return TensorRef(number, getattr(torch, self._tensors[number].dtype), shape)


def differing(values: Iterable[Mapping[str, str]]) -> list[str]:
    """The names of Python values of which two ranks have different ones, from the ranks' digests."""
    seen: dict[str, set[str]] = {}
    for held in values:
        for name, digest in held.items():
            seen.setdefault(name, set()).add(digest)
    return sorted(name for name, digests in seen.items() if len(digests) > 1)
