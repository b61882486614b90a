"""The `data.pkl` of an archive: the nested state with its tensors named by record, as `torch.save` would write it.

Source of the format: `torch.serialization._save` and `Tensor._reduce_ex_internal` (pickle protocol 2, a
storage is the persistent id `("storage", type, key, "cpu", numel)`). Reading goes through torch's own
`weights_only` unpickler, with storages on the meta device: nothing is allocated, and nothing that is not on
torch's allow-list is ever called.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for a tensor in a tree that is to be pickled: record number, dtype and (local) shape."""

    record: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _StorageRef:
    record: int
    dtype: torch.dtype
    nbytes: int


class UnsafeValueError(ValueError):
    """A value that torch's `weights_only` loading would refuse."""


def encode_tree(tree: Any) -> bytes:
    """The pickle of nested containers whose tensors have been replaced by `TensorRef`s."""
    buffer = io.BytesIO()
    _TreePickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


def decode_tree(data: bytes) -> Any:
    """The nested containers again, with a meta tensor (dtype and shape, no data) for every tensor.

    `data` is untrusted beyond its checksum. Raises `ValueError` for whatever does not parse, and for
    anything that is not on the allow-list.
    """
    from torch import _weights_only_unpickler as restricted

    unpickler = restricted.Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = _meta_storage
    try:
        return unpickler.load()
    except Exception as error:  # torch lets AssertionError, AttributeError, IndexError, ... escape here (FACTS: fuzzed)
        raise ValueError(f"not a well-formed, weights_only-safe pickle: {type(error).__name__}: {error}") from error


def check_value(value: Any) -> None:
    """Raise `UnsafeValueError` unless loading gives the value back without running code.

    Builtin scalars, strings, bytes and containers of them pass at once; all else must survive a real round trip.
    """
    if _is_plain(value):
        return
    try:
        decode_tree(encode_tree(value))
    except Exception as error:
        raise UnsafeValueError(
            f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be stored, because loading it "
            f"back would need to run code ({error}); store numbers, strings, bytes, tensors, lists, tuples and dicts"
        ) from error


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in (list, tuple, set):
        return all(_is_plain(item) for item in value)
    if kind in (dict, OrderedDict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return False


class _TreePickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not TensorRef:
            if isinstance(obj, torch.Tensor):
                raise UnsafeValueError("a tensor inside an opaque container; use dicts, lists and plain tuples")
            return NotImplemented
        stride = _contiguous_stride(obj.shape)
        storage = _StorageRef(obj.record, obj.dtype, math.prod(obj.shape) * obj.dtype.itemsize)
        arguments = (storage, 0, obj.shape, stride, False, OrderedDict())
        if obj.dtype in torch.storage._dtype_to_storage_type_map():
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, obj.dtype)

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not _StorageRef:
            return None
        name = torch.storage._dtype_to_storage_type_map().get(obj.dtype)
        if name is None:
            return ("storage", torch.storage.UntypedStorage, str(obj.record), "cpu", obj.nbytes)
        return ("storage", getattr(torch, name), str(obj.record), "cpu", obj.nbytes // obj.dtype.itemsize)


def _meta_storage(saved_id: Any) -> Any:
    if not isinstance(saved_id, tuple) or len(saved_id) != 5 or saved_id[0] != "storage":
        raise ValueError(f"unknown persistent id {saved_id!r}")
    _, kind, _, _, numel = saved_id
    dtype = torch.uint8 if kind is torch.storage.UntypedStorage else kind.dtype
    nbytes = int(numel) * dtype.itemsize
    untyped = torch.UntypedStorage(nbytes, device="meta")
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))


def map_leaves(tree: Any, visit: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """The same nesting with each leaf replaced by `visit(path, leaf)`.

    Mappings become plain dicts. Lists and plain tuples are entered only where they hold a tensor or a mapping
    somewhere; otherwise they are leaves: values of their own.
    """
    if isinstance(tree, dict) or hasattr(tree, "keys"):
        return {key: map_leaves(item, visit, (*path, key)) for key, item in tree.items()}
    if type(tree) in (list, tuple) and _holds_tensor_or_mapping(tree):
        items = [map_leaves(item, visit, (*path, i)) for i, item in enumerate(tree)]
        return items if type(tree) is list else tuple(items)
    return visit(path, tree)


def _holds_tensor_or_mapping(items: Any) -> bool:
    return any(
        isinstance(item, (torch.Tensor, dict)) or (type(item) in (list, tuple) and _holds_tensor_or_mapping(item))
        for item in items
    )
