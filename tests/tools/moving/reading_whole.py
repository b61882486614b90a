"""What a source gives, put together to tensors: for tests only, which hold everything at once."""

from __future__ import annotations

from typing import Any

import torch

from shardckpt.tools.moving.seam import TensorName, TensorSource, Window


def whole_of(source: TensorSource, name: str, *, window: int | None = None) -> torch.Tensor:
    """A tensor, read in windows of so many bytes."""
    facts = source.tensors[name]
    content = bytearray(facts.nbytes)
    view = memoryview(content)
    step = window or max(facts.nbytes, 1)
    source.read([Window(name, at, view[at : at + step]) for at in range(0, facts.nbytes, step)])
    dtype = getattr(torch, facts.dtype)
    if not content:
        return torch.empty(facts.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(facts.shape)


def nested_of(source: TensorSource, *, window: int | None = None) -> Any:
    """The tree with its tensors."""
    found = {name: whole_of(source, name, window=window) for name in source.tensors}

    def filled(node: Any) -> Any:
        if isinstance(node, TensorName):
            return found[source.ties.get(node.name, node.name)]
        if isinstance(node, dict):
            return {key: filled(item) for key, item in node.items()}
        return [filled(item) for item in node] if type(node) is list else node

    return filled(source.tree)
