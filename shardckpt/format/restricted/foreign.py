"""What the pickle of any `torch.save` may name: views of storages as they lie in its file, and what NumPy puts there.

Our own files hold contiguous tensors, one for a storage, and no more. Those of others hold views that share storages,
with any strides, `nn.Parameter`s, and, in saved random states, arrays. All of that is told here as plain data: nothing
of torch or NumPy is called with what a file says, and no memory is taken for it.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.format.index import ITEMSIZE, MAX_DIMS, as_size
from shardckpt.format.placement import Box
from shardckpt.format.restricted.allowed import Built, Callee, Dialect, Record, Storage, known_globals
from shardckpt.format.restricted.dtensors import REBUILD, WholeOf, boxes_of, dtensor_globals
from shardckpt.format.restricted.machine import read_pickle

_TOO_LARGE = 1 << 62


@dataclass(frozen=True, slots=True)
class StoredView:
    """Stands in a tree for a tensor: which elements of which storage it is made of."""

    key: str
    """Of the storage, in its file."""
    storage_nbytes: int
    dtype: str
    offset: int
    """In elements, as are the strides."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in their order."""
        step = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != step:
                return self.numel == 0
            step *= length
        return True


@dataclass(frozen=True, slots=True)
class StoredShard:
    """Stands for a DTensor: the local tensor, and what it is of the whole one."""

    local: StoredView
    shape: tuple[int, ...]
    """Of the whole tensor."""
    boxes: tuple[Box, ...]
    """Where the local one belongs; none if it has no elements."""

    @property
    def is_whole(self) -> bool:
        return self.local.shape == self.shape


def read_foreign(data: bytes) -> Any:
    """The tree of the pickle of any `torch.save`, with a `StoredView` for each tensor and a `StoredShard` for each
    DTensor; arrays come as lists of numbers.

    `data` is untrusted: `ValueError` for whatever is malformed, not on the allow-list, or not a tree. What a user has
    added by `torch.serialization.add_safe_globals` is on the list.
    """
    tree = read_pickle(data, Dialect((2, 4, 5), _foreign_globals, additions=True))
    return _plain(tree) if b"numpy" in data or b"torch.distributed" in data else tree


@functools.lru_cache(maxsize=1)
def views_for_tensors() -> dict[str, Any]:
    """What a pickle may name in which tensors are `StoredView`s, and nothing else is anything but itself."""
    return {
        **known_globals(),
        "torch._utils._rebuild_tensor_v2": Callee(_view),
        "torch._utils._rebuild_tensor_v3": Callee(_view_of_dtype),
        "torch._utils._rebuild_parameter": Callee(_parameter),
        "torch._utils._rebuild_parameter_with_state": Callee(_parameter),
        "torch._tensor._rebuild_from_type_v2": Callee(_with_attributes),
        "torch.Tensor": _TENSOR,
        "torch.nn.parameter.Parameter": _TENSOR,
        "builtins.bytes": Callee(_no_bytes),
    }


@functools.lru_cache(maxsize=1)
def _foreign_globals() -> dict[str, Any]:
    known = {**views_for_tensors(), **dtensor_globals(), "numpy.ndarray": _ARRAY, "numpy.dtype": Callee(_Dtype)}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known |= {f"{module}._reconstruct": Callee(_array), f"{module}.scalar": Callee(_number)}
    return known


def _no_bytes() -> bytes:
    """How protocol 2 spells b"": a call of `bytes` with nothing."""
    return b""


def _never(*_: Any) -> Any:
    raise ValueError("a class that is only named, and never called")


_TENSOR, _ARRAY = Callee(_never), Callee(_never)


def _view(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> StoredView:
    """The arguments are those of `torch._utils._rebuild_tensor_v2`."""
    dtype = storage.dtype if type(storage) is Storage else None
    return _checked(storage, dtype, offset, size, stride, metadata)


def _view_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredView:
    """The arguments are those of `torch._utils._rebuild_tensor_v3`."""
    return _checked(storage, dtype, offset, size, stride, metadata)


def _checked(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any) -> StoredView:
    if type(storage) is not Storage or type(dtype) is not torch.dtype:
        raise ValueError("a tensor of something other than a storage")
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise ValueError("a tensor of a dtype that is never stored")
    if metadata:
        raise ValueError("a tensor that is conjugated or negated only when it is read: save it after resolve_conj()")
    shape, strides = _sizes(size), _sizes(stride)
    if len(shape) != len(strides):
        raise ValueError("a tensor with strides for other dimensions than it has")
    view = StoredView(storage.key, storage.nbytes, name, as_size(offset), shape, strides)
    last = view.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    if view.numel and (last * ITEMSIZE[name] > storage.nbytes or view.nbytes >= _TOO_LARGE):
        raise ValueError(f"a tensor that leaves its storage of {storage.nbytes} bytes")
    return view


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_DIMS:
        raise ValueError("sizes of something other than dimensions")
    return tuple([as_size(value) for value in values])


def _parameter(data: Any, *_: Any) -> StoredView:
    if type(data) is not StoredView:
        raise ValueError("a parameter of something other than a tensor")
    return data


def _with_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> StoredView | StoredShard:
    """A DTensor; or a tensor to which attributes were given, which are no part of a state: they are left out."""
    if function is REBUILD and type(arguments) is tuple:
        return _shard(REBUILD.apply(*arguments), state)
    if kind is not _TENSOR or type(function) is not Callee or type(arguments) is not tuple:
        raise ValueError("a tensor of a class of its own")
    return _parameter(function.apply(*arguments))


def _shard(whole: WholeOf, state: Any) -> StoredShard:
    """`state` is that of an object, of which slots are the second half."""
    fields = state[1] if type(state) is tuple and len(state) == 2 else state
    local = fields.get("_local_tensor") if type(fields) is dict else None
    if type(local) is not StoredView or whole.dtype is not getattr(torch, local.dtype):
        raise ValueError("a DTensor without its local tensor")
    return StoredShard(local, whole.shape, boxes_of(whole, fields.get("_spec"), local.shape))


_FORMATS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "f2": "e",
    "i4": "i",
    "u4": "I",
    "f4": "f",
    "i8": "q",
    "u8": "Q",
    "f8": "d",
}
"""What `struct` calls the dtypes of NumPy that are read."""


class _Dtype(Built):
    def __init__(self, name: Any, *_: Any) -> None:
        if type(name) is not str or name not in _FORMATS:
            raise ValueError("an array of other things than plain numbers")
        self.format, self.order = _FORMATS[name], "<"

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or type(state[1]) is not str or state[1] not in ("<", ">", "|"):
            raise ValueError("a dtype of NumPy that is not well-formed")
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, content: Any) -> list[Any]:
        itemsize = struct.calcsize(f"<{self.format}")
        if type(content) is not bytes or len(content) % itemsize:
            raise ValueError("an array without its bytes")
        return list(struct.unpack(f"{self.order}{len(content) // itemsize}{self.format}", content))


class _Array(Built):
    """A list of numbers, once it has been told which."""

    def __init__(self) -> None:
        self.numbers: list[Any] | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _Dtype:
            raise ValueError("an array of NumPy that is not well-formed")
        _, shape, dtype, _, content = state
        numbers = dtype.numbers(content)
        if len(_sizes(shape)) != 1 or shape[0] != len(numbers):
            raise ValueError("an array of NumPy that is no plain row of numbers: store a tensor")
        self.numbers = numbers


def _array(kind: Any, *_: Any) -> _Array:
    """As `numpy._core.multiarray._reconstruct` makes an empty one."""
    if kind is not _ARRAY:
        raise ValueError("an array of a class of its own")
    return _Array()


def _number(dtype: Any, content: Any) -> Any:
    """As `numpy._core.multiarray.scalar` makes one."""
    numbers = dtype.numbers(content) if type(dtype) is _Dtype else []
    if len(numbers) != 1:
        raise ValueError("a number of NumPy that is not well-formed")
    return numbers[0]


def _plain(node: Any) -> Any:
    """The same with lists for arrays."""
    if isinstance(node, _Array):
        if node.numbers is None:
            raise ValueError("an array of NumPy that is never told its numbers")
        return node.numbers
    if isinstance(node, _Dtype):
        raise ValueError("a dtype of NumPy is no state")
    if isinstance(node, (Record, WholeOf)):
        raise ValueError("a placement of DTensors is no state")
    if isinstance(node, dict):
        return {key: _plain(item) for key, item in node.items()}
    if type(node) in (list, tuple):
        return type(node)(map(_plain, node))
    return node
