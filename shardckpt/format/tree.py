"""The `data.pkl` of an archive: the nested state with its tensors named by record, as `torch.save` would write it.

Source of the format: `torch.serialization._save` and `Tensor._reduce_ex_internal` (pickle protocol 2, a
storage is the persistent id `("storage", type, key, "cpu", numel)`). Containers and tensors are spelled out here, a
tensor in one microsecond; only values are left to `pickle`. Reading is in `shardckpt.format.restricted`.
"""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import math
import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.format.restricted import machine, measure
from shardckpt.format.restricted.allowed import contiguous_stride

MAX_LEVELS = 100
"""Containers within containers in a value, and above it; together well below what reading accepts."""
_LONGEST_INT = 2039
"""Bits of the largest number that `torch.load(weights_only=True)` reads."""
_SCALARS = frozenset((type(None), bool, float, str, bytes))
_HAS_EMPTY_BYTES = b"c__builtin__\nbytes\n"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for a tensor in a tree that is to be pickled: record number, dtype and (local) shape."""

    record: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueRef:
    """Stands for a value in a tree that is to be pickled: its number in `SpelledTree.values`."""

    number: int


@dataclass(frozen=True, slots=True)
class SpelledTree:
    """A pickle in pieces; a number stands for a value, spelled by itself: from save to save only values are new."""

    pieces: tuple[bytes | int, ...]
    values: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """The pickle."""
        return b"".join([self.values[piece] if type(piece) is int else piece for piece in self.pieces])  # type: ignore[misc]


_REFS = (TensorRef, ValueRef)


class UnsafeValueError(ValueError):
    """A value that torch's `weights_only` loading would refuse."""


def encode_tree(tree: Any) -> bytes:
    """The pickle of nested dicts, lists and tuples whose tensors have been replaced by `TensorRef`s.

    `UnsafeValueError` for a tensor or a `TensorRef` elsewhere, and whatever `pickle` raises for other values; what it
    takes may still be refused when it is read: see `check_value`.
    """
    return spell_tree(tree).encode()


def spell_tree(tree: Any, values: Sequence[bytes] = ()) -> SpelledTree:
    """The same in pieces, where `ValueRef`s may stand for `values`, which `spell_value` gave."""
    pieces: list[bytes | int] = []
    _spell(tree, pieces.append, 0)
    runs = [(kind, list(those)) for kind, those in itertools.groupby([b"\x80\x02", *pieces, b"."], type)]
    joined = itertools.chain(*(run if kind is int else [b"".join(run)] for kind, run in runs))  # type: ignore[arg-type]
    return SpelledTree(tuple(joined), tuple(values))


def decode_tree(data: bytes) -> Any:
    """The nested containers again, with a meta tensor (dtype and shape, no data) for every tensor.

    `data` is untrusted. `ValueError` for what does not parse, and for what is not on the allow-list.
    """
    return machine.read_pickle(data)


def check_value(value: Any) -> None:
    """`UnsafeValueError` unless `torch.load(weights_only=True)` gives the value back. Plain ones pass at once."""
    problem = _problem(value)
    if problem:
        culprit = _culprit(value, 0)
        raise UnsafeValueError(
            f"a value of type {_name_of(culprit)} cannot be stored, because loading would not give it back without "
            f"running code ({_problem(culprit) or problem}); store numbers, strings, tensors, lists, tuples and dicts"
        )


def map_leaves(tree: Any, visit: Callable[[tuple[Any, ...], Any], Any], path: tuple[Any, ...] = ()) -> Any:
    """The same nesting with each leaf replaced by `visit(path, leaf)`.

    Mappings become plain dicts; an empty one is a leaf, so that it is not lost. Lists and plain tuples are entered
    only where they hold a tensor or a mapping somewhere; otherwise they are leaves: values of their own.
    `UnsafeValueError` for what is nested too deeply, or holds itself.
    """
    if len(path) > MAX_LEVELS:
        raise UnsafeValueError(f"more than {MAX_LEVELS} containers within each other below {path[0]!r}; flatten them")
    if isinstance(tree, torch.Tensor) or not is_branch(tree):
        return visit(path, tree)
    if type(tree) in (list, tuple):
        items = [map_leaves(item, visit, (*path, i)) for i, item in enumerate(tree)]
        return items if type(tree) is list else tuple(items)
    return {key: map_leaves(item, visit, (*path, key)) for key, item in tree.items()}


def is_branch(node: Any) -> bool:
    """Whether `map_leaves` enters it. Not for tensors, which are leaves."""
    if type(node) in (list, tuple):
        return _holds(node, (torch.Tensor, dict), 0)
    return (isinstance(node, dict) or hasattr(node, "keys")) and len(node) > 0


def _holds(items: Iterable[Any], kinds: tuple[type, ...], depth: int) -> bool:
    """Whether nested lists, tuples (and dicts) hold one of these kinds. Too deep ones do not: they fail elsewhere."""
    if depth > MAX_LEVELS:
        return False
    for item in items:
        if isinstance(item, kinds):
            return True
        if type(item) in (list, tuple, dict):
            below = item.values() if type(item) is dict else item
            if below and _holds(below, kinds, depth + 1):
                return True
    return False


def _spell(node: Any, put: Callable[[bytes | int], None], depth: int) -> None:
    """Opcodes for a tree. Nothing here is memoised, so that each value may use the memo as it likes."""
    kind = type(node)
    if kind is ValueRef:
        put(node.number)
    elif kind is TensorRef:
        before, after = _spell_tensor(node.dtype, node.shape)
        number = str(node.record).encode()
        put(before)
        put(struct.pack("<BI", 0x58, len(number)) + number)
        put(after)
    elif depth > 2 * MAX_LEVELS:
        raise UnsafeValueError(f"more than {2 * MAX_LEVELS} containers within each other")
    elif kind is dict and _holds(node.values(), _REFS, 0):
        put(b"}(")
        for key, item in node.items():
            put(_spell_text(key) if type(key) is str else spell_value(key))
            _spell(item, put, depth + 1)
        put(b"u")
    elif kind in (list, tuple) and _holds(node, _REFS, 0):
        put(b"](" if kind is list else b"(")
        for item in node:
            _spell(item, put, depth + 1)
        put(b"e" if kind is list else b"t")
    else:
        put(spell_value(node))


def _spell_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<BI", 0x58, len(data)) + data


@functools.lru_cache(maxsize=4096)
def _spell_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What comes before and after the record's number: `_rebuild_tensor_v2`, or `_v3` for dtypes without a storage."""
    numel = math.prod(shape)
    kind = torch.storage._dtype_to_storage_type_map().get(dtype)
    if kind is not None:
        function, storage, last = b"_rebuild_tensor_v2", b"torch\n" + kind.encode(), b""
    else:
        function, storage = b"_rebuild_tensor_v3", b"torch.storage\nUntypedStorage"
        last = b"ctorch\n" + str(dtype).removeprefix("torch.").encode() + b"\n"
        numel *= dtype.itemsize
    before = [b"ctorch._utils\n", function, b"\n((", _spell_text("storage"), b"c", storage, b"\n"]
    numbers = [spell_value(number) for number in (numel, 0, tuple(shape), contiguous_stride(shape))]
    after = [_spell_text("cpu"), numbers[0], b"tQ", *numbers[1:], b"\x89ccollections\nOrderedDict\n)R", last, b"tR"]
    return b"".join(before), b"".join(after)


def spell_value(value: Any) -> bytes:
    """The pickle of a value without its first opcode (the protocol) and its last (stop); errors as of `encode_tree`."""
    data = _dump(value)
    if _HAS_EMPTY_BYTES in data:
        data = _dump(value := _with_empty_bytes(value))
    if measure.shares_too_much(value, len(data) - 3):  # would be refused when it is read, as made to do harm
        data = _dump(value, shared=False)
    return data[2:-1]


def _dump(value: Any, *, shared: bool = True) -> bytes:
    buffer = io.BytesIO()
    pickler = _ValuePickler(buffer, protocol=2)
    pickler.fast = not shared
    pickler.dump(value)
    return buffer.getvalue()


class _ValuePickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (torch.Tensor, *_REFS)):
            raise UnsafeValueError("a tensor inside an opaque container; use dicts, lists and plain tuples")
        return NotImplemented


class _EmptyBytes:
    """Stands for b"", which protocol 2 spells as a call of `bytes` that `weights_only` refuses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return codecs.encode, ("", "latin1")


def _with_empty_bytes(value: Any) -> Any:
    kind = type(value)
    if kind is bytes and not value:
        return _EmptyBytes()
    if kind in (list, tuple, set):
        return kind(map(_with_empty_bytes, value))
    if kind in (dict, OrderedDict):
        return kind((_with_empty_bytes(key), _with_empty_bytes(item)) for key, item in value.items())
    return value


def _problem(value: Any) -> str:
    """Why the value would not come back; empty if it would."""
    try:
        if _is_plain(value, 0):
            return ""
        back = decode_tree(encode_tree(value))
        return "" if _is_same(value, back) else f"it would come back as {_name_of(back)}"
    except RecursionError:
        return f"more than {MAX_LEVELS} containers within each other"
    except Exception as error:  # a value's own `__reduce__`, `__eq__` or `keys` may raise anything
        return str(error.__cause__ or error) or type(error).__name__


def _name_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _culprit(value: Any, depth: int) -> Any:
    """The innermost value that is the reason; the value itself where it is not in its parts."""
    parts: list[Any] = []
    if type(value) in (dict, OrderedDict):
        parts = [*value.keys(), *value.values()]
    elif type(value) in (list, tuple, set):
        parts = list(value)
    for part in parts:
        if depth < MAX_LEVELS and _problem(part):
            return _culprit(part, depth + 1)
    return value


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind is int:
        return bool(value.bit_length() <= _LONGEST_INT)
    if kind in _SCALARS:
        return True
    if depth >= MAX_LEVELS:
        raise RecursionError
    if kind in (list, tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if kind is set:
        return all(type(item) in _SCALARS or (type(item) is int and _is_plain(item, depth)) for item in value)
    if kind in (dict, OrderedDict):
        keys = all(type(key) in _SCALARS or (type(key) is int and _is_plain(key, depth)) for key in value)
        return keys and all(_is_plain(item, depth + 1) for item in value.values())
    return False


def _is_same(value: Any, back: Any) -> bool:
    """Whether a value came back as it was. Of classes that the user has allowed, only the class is looked at."""
    if type(value) is not type(back):
        return False
    if isinstance(value, (dict, list, tuple)):
        if len(value) != len(back):
            return False
        if isinstance(value, dict):
            return all(_is_same(*pair) for pair in zip(value.items(), back.items(), strict=True))
        return all(_is_same(*pair) for pair in zip(value, back, strict=True))
    if isinstance(value, (float, complex)):
        return bool(value == back) or (value != value and back != back)
    if isinstance(value, (int, str, bytes, bytearray, set, Counter, torch.dtype, torch.device)):
        return bool(value == back)
    return True
