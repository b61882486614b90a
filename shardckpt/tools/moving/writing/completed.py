"""A source with parts that it did not have: from other checkpoints, or of a state in memory. What is there stays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast

import torch

from shardckpt.errors import InvalidStateError
from shardckpt.storage.base import Buffer
from shardckpt.tools.moving.folders import find
from shardckpt.tools.moving.foreign.combined import Combined, origins
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window

Addition: TypeAlias = Any
"""A checkpoint of any known form that has a part of that name; or its state, or an object with `state_dict`."""


class StateSource:
    """A state in memory, as a `TensorSource`. Its tensors must not change meanwhile; those of a GPU are copied."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.tensors: dict[str, TensorFacts] = {}
        self.ties: dict[str, str] = {}
        self._bytes: dict[str, memoryview] = {}
        self.tree = walk(state, torch.Tensor, self._take)

    def _take(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name, whole = flat_name(path), leaf.detach().cpu().contiguous()
        self.tensors[name] = TensorFacts(str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
        self._bytes[name] = memoryview(cast(Buffer, whole.reshape(-1).view(torch.uint8).numpy()))
        return TensorName(name)

    def read(self, windows: Sequence[Window]) -> None:
        for window in windows:
            window.into[:] = self._bytes[window.name][window.start : window.start + len(window.into)]

    def close(self) -> None:
        """Nothing is held open."""


def completed(
    source: TensorSource, added: Mapping[str, Addition], *, storage_options: Mapping[str, object] | None = None
) -> tuple[TensorSource, dict[str, str]]:
    """The source with these parts, by name, and in words where each came from. Closing it closes all of them.

    `InvalidStateError` if the source has such a part, or one is no state; as `find` for checkpoints that are named.
    """
    tree, told = dict(origins(source)), dict[str, str]()
    with ExitStack() as stack:
        for part, what in added.items():
            if part in tree:
                raise InvalidStateError(f"{part!r} is in the checkpoint already: what is there is never replaced")
            tree[part], told[part] = _opened(stack, part, what, storage_options)
        return Combined(tree, close=stack.pop_all().close), told


def _opened(stack: ExitStack, part: str, what: Addition, options: Mapping[str, object] | None) -> tuple[Any, str]:
    if isinstance(what, (str, os.PathLike)) or hasattr(what, "read_into"):
        found = find(what, parts=[part], storage_options=options)
        stack.callback(found.source.close)
        return origins(found.source)[part], f"{found.kind}{'' if found.step is None else f', step {found.step}'}"
    state = what.state_dict() if hasattr(what, "state_dict") else what
    if not isinstance(state, Mapping):
        raise InvalidStateError(f"{part!r} is to be added as a {type(what).__name__}, which is no state")
    return origins(StateSource({part: state}))[part], "a state that was given"
