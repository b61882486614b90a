"""Sources read to the last byte, as sinks do it, for comparison with what other libraries read."""

from __future__ import annotations

from typing import Any

import torch

from shardckpt.tools.moving.foreign.nesting import walk
from shardckpt.tools.moving.seam import TensorName, TensorSource, Window


def tensors_of(source: TensorSource, *, piece: int = 1 << 20) -> dict[str, torch.Tensor]:
    """All tensors, tied ones too, read in pieces of so many bytes."""
    found: dict[str, torch.Tensor] = {}
    for name, facts in source.tensors.items():
        content = bytearray(facts.nbytes)
        view = memoryview(content)
        for start in range(0, facts.nbytes, piece):
            source.read([Window(name, start, view[start : start + piece])])
        dtype = getattr(torch, facts.dtype)
        found[name] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        found[name] = found[name].reshape(facts.shape)
    return found | {name: found[first] for name, first in source.ties.items()}


def state_of(source: TensorSource, *, piece: int = 1 << 20) -> Any:
    """The nested state, with its tensors."""
    tensors = tensors_of(source, piece=piece)
    return walk(source.tree, TensorName, lambda _, leaf: tensors[leaf.name] if isinstance(leaf, TensorName) else leaf)


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same, bit for bit: tensors by dtype, shape and bytes, all else by value."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bits(one) == bits(other)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
