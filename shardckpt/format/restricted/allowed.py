"""What a pickle may name: torch's `weights_only` allow-list, each callable with a check of its arguments.

Every function here is called with whatever a hostile file puts on the stack: it looks at the type of an argument
before it does anything with it. (A meta tensor of 10**12 rows must not be iterated, a tuple that shares itself forty
levels deep must be neither hashed nor printed.)
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.format.index import ITEMSIZE, MAX_DIMS, as_size

_MAX_KEY_NODES = 1000
_BLOCKED = ("sys", "os", "posix", "nt", "torch")
"""Packages of which nothing can be added to the allow-list; what torch adds to it by itself is not state."""


@dataclass(frozen=True, slots=True)
class Callee:
    """An allowed callable: the file may call it, but it is no value."""

    apply: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Maker:
    """An allowed class of which the file makes objects by their parts (NEWOBJ), as of a named tuple; it is no value."""

    apply: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class StorageKind:
    """A storage class; without a dtype the untyped one, whose elements are bytes."""

    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Storage:
    """What a persistent id stands for: so many bytes, in the record of the archive that is called `data/<key>`."""

    dtype: torch.dtype | None
    nbytes: int
    key: str = ""


class Built:
    """An object that a file may go on to build: its state comes after it was made, and is checked by `build`."""

    def build(self, state: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which pickles are read: of which protocols, and what they may name."""

    protocols: tuple[int, ...]
    known: Callable[[], Mapping[str, Any]]
    additions: bool
    """Whether also what the user has allowed by `torch.serialization.add_safe_globals`."""


@dataclass(frozen=True, slots=True)
class RecordKind:
    """A class that is known by its name only: the file may make objects of it, which are `Record`s here."""

    name: str


@dataclass(slots=True, eq=False)
class Record(Built):
    """What a file says of an object of such a class: its state as it was pickled. A value; nothing of it is run."""

    kind: str
    state: Any = None

    def build(self, state: Any) -> None:
        if self.state is not None:
            raise ValueError(f"a {self.kind} that is built twice")
        self.state = state


@functools.lru_cache(maxsize=1)
def known_globals() -> dict[str, Any]:
    """Torch's default list, without what is not state: tensor classes, parameters, sparse and quantised tensors."""
    known: dict[str, Any] = {
        "collections.OrderedDict": Callee(_ordered_dict),
        "collections.Counter": Callee(_counter),
        "builtins.set": Callee(_set),
        "builtins.complex": Callee(_complex),
        "builtins.bytearray": Callee(_bytearray),
        "_codecs.encode": Callee(_latin1),
        "torch.Size": Callee(_size),
        "torch.device": Callee(_device),
        "torch.serialization._get_layout": Callee(_layout),
        "torch._utils._rebuild_tensor_v2": Callee(_tensor),
        "torch._utils._rebuild_tensor_v3": Callee(_tensor),
        "torch.storage.UntypedStorage": StorageKind(None),
    }
    named = {name: value for name, value in vars(torch).items() if isinstance(value, (torch.dtype, torch.qscheme))}
    known |= {f"torch.{name}": value for name, value in named.items() if str(value) == f"torch.{name}"}
    for dtype, storage in torch.storage._dtype_to_storage_type_map().items():
        if str(dtype).removeprefix("torch.") in ITEMSIZE:
            known[f"torch.{storage}"] = StorageKind(dtype)
    return known


WEIGHTS = Dialect((2,), known_globals, additions=True)
"""What `torch.load(weights_only=True)` reads, without what is not state."""


def added_by_user() -> dict[str, Any]:
    """What `torch.serialization.add_safe_globals` was given, by name; a pair is (thing, name)."""
    added: dict[str, Any] = {}
    for entry in torch.serialization.get_safe_globals():
        thing, name = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
        if name.split(".", 1)[0] not in _BLOCKED:
            added[name] = thing
    return added


def is_value(thing: Any) -> bool:
    """Whether it may be in a tree: not something that is only there to be called or referred to."""
    return type(thing) not in (Callee, Maker, StorageKind, Storage, RecordKind)


def as_key(key: Any) -> Any:
    """The key itself, if it is a value and cheap to hash; tuples within tuples are hashed each time they occur."""
    pending, nodes = [key], 0
    while pending:
        node = pending.pop()
        if not is_value(node):
            raise ValueError("a key that is not a value")
        if isinstance(node, tuple):
            nodes += len(node)
            if nodes > _MAX_KEY_NODES:
                raise ValueError("a key of too many parts")
            pending += node
    return key


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a row-major tensor of this shape, as torch counts them."""
    stride: list[int] = []
    step = 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any = None
) -> torch.Tensor:
    """A meta tensor; the arguments are those of `torch._utils._rebuild_tensor_v2` and, with `dtype`, `_v3`."""
    if type(storage) is not Storage or type(size) is not tuple or len(size) > MAX_DIMS or offset != 0:
        raise ValueError("a tensor that is not a whole storage")
    dtype = storage.dtype if dtype is None else dtype
    if type(dtype) is not torch.dtype or str(dtype).removeprefix("torch.") not in ITEMSIZE:
        raise ValueError("a tensor of a dtype that is never stored")
    nbytes = dtype.itemsize
    for length in size:
        nbytes *= as_size(length)
    if nbytes != storage.nbytes or type(stride) is not tuple or stride != contiguous_stride(size):
        raise ValueError(f"{storage.nbytes} bytes are not a contiguous {dtype} tensor of this shape")
    return torch.empty(size, dtype=dtype, device="meta")


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if type(pairs) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError("an OrderedDict of something other than pairs")
    return OrderedDict((as_key(key), value) for key, value in pairs)


def _counter(counts: Any = None) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    if counts is not None:
        if type(counts) is not dict:
            raise ValueError("a Counter of something other than a dict")
        dict.update(counter, counts)  # as they are, also where a count is not a number
    return counter


def _set(items: Any = ()) -> set[Any]:
    if type(items) not in (list, tuple):
        raise ValueError("a set of something other than a list")
    return {as_key(item) for item in items}


def _complex(real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise ValueError("a complex number of something other than two numbers")
    return complex(real, imag)


def _bytearray(content: Any = b"", codec: Any = None) -> bytearray:
    if codec is not None:
        content = _latin1(content, codec)
    if type(content) is not bytes:
        raise ValueError("a bytearray of something other than bytes")
    return bytearray(content)


def _latin1(text: Any, codec: Any) -> bytes:
    """How protocol 2 spells bytes: `_codecs.encode(text, "latin1")`."""
    if type(text) is not str or type(codec) is not str or codec not in ("latin1", "latin-1"):
        raise ValueError("an encoding that is not latin1")
    return text.encode("latin-1")


def _size(sizes: Any) -> torch.Size:
    if type(sizes) is not tuple:
        raise ValueError("a torch.Size of something other than a tuple")
    return torch.Size([as_size(size) for size in sizes])


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise ValueError("a device of something other than a name and a number")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> torch.layout:
    if type(name) is not str:
        raise ValueError("a layout that is not named")
    layout: torch.layout = torch.serialization._get_layout(name)
    return layout
