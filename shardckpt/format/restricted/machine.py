"""The stack machine: the part of pickle protocol 2 that `encode_tree` writes, and that `torch.load` reads.

2026-11, why not torch's own restricted unpickler: it calls allowed classes with any arguments (`bytearray(1 << 40)`,
`torch.Tensor(1 << 40)`, and once `torch.distributed.tensor` is imported `DeviceMesh(...)`, which starts a process
group), formats whatever it refuses into its message (a few bytes of shared tuples print as petabytes), and takes
0.9 s for 20,000 tensors. And why not `pickle.Unpickler` with `find_class`: it fills its memo up to any index that the
file names (32 GiB of zeros for ten bytes), and BUILD sets attributes of any object.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from shardckpt.format.index import as_size
from shardckpt.format.restricted.allowed import (
    WEIGHTS,
    Built,
    Callee,
    Dialect,
    Maker,
    Record,
    RecordKind,
    Storage,
    StorageKind,
    added_by_user,
    as_key,
)
from shardckpt.format.restricted.measure import check_tree

_STOP = ord(".")


def read_pickle(data: bytes, dialect: Dialect = WEIGHTS) -> Any:
    """The tree of a pickle, in which the dialect says what stands for a tensor: usually a contiguous meta tensor.

    `data` is untrusted: `ValueError` for whatever is malformed, not on the allow-list, or not a tree.
    """
    try:
        tree = _Machine(data, dialect).run()
        check_tree(tree, len(data))
    except Exception as error:  # whatever malformed content leads to: a wrong type, index, key, number
        raise ValueError(f"not a well-formed, weights_only-safe pickle: {type(error).__name__}: {error}") from error
    return tree


class _Machine:
    """Stack, marks and memo. Each opcode is a method; `_STEPS` says which."""

    __slots__ = ("_added", "_at", "_data", "_found", "_known", "_marks", "_memo", "_protocols", "_stack")

    def __init__(self, data: bytes, dialect: Dialect) -> None:
        self._data = data
        self._protocols = dialect.protocols
        self._known = dialect.known()
        self._at = 2
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._found: dict[bytes, Any] = {}
        self._added = added_by_user() if dialect.additions else {}

    def run(self) -> Any:
        data = self._data
        if data[:1] != b"\x80" or data[1] not in self._protocols:
            raise ValueError(f"it does not begin as protocol {' or '.join(map(str, self._protocols))}")
        steps = _STEPS if data[1] < 4 else _STEPS_OF_4
        while (code := data[self._at]) != _STOP:
            self._at += 1
            step = steps.get(code)
            if step is None:
                raise ValueError(f"opcode {code:#x} at byte {self._at - 1}")
            step(self)
        if self._at + 1 != len(data) or len(self._stack) != 1 or self._marks:
            raise ValueError(f"it stops at byte {self._at}, but that is not its end")
        return self._stack[0]

    def _take(self, nbytes: int) -> bytes:
        piece = self._data[self._at : self._at + nbytes]
        if len(piece) != nbytes:
            raise ValueError(f"{nbytes} bytes at {self._at} of {len(self._data)}")
        self._at += nbytes
        return piece

    def _line(self) -> bytes:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end]
        self._at = end + 1
        return line

    def _unsigned(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_byte(self) -> None:
        self._stack.append(self._data[self._at])
        self._at += 1

    def push_signed(self, nbytes: int) -> None:
        self._stack.append(int.from_bytes(self._take(nbytes), "little", signed=True))

    def push_float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def push_text(self, nbytes: int = 4) -> None:
        self._stack.append(str(self._take(self._unsigned(nbytes)), "utf-8", "surrogatepass"))

    def make_tuple(self, count: int | None = None) -> None:
        if count is None:
            items = self._since_mark()  # first: it changes which stack is on top
            self._stack.append(tuple(items))
        elif len(self._stack) >= count:
            self._stack[-count:] = [tuple(self._stack[-count:])]
        else:
            raise ValueError("too little for a tuple")

    def extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items for what is not a list")
        self._stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict, Counter):
            raise ValueError("keys for what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    def put(self, nbytes: int) -> None:
        self._memo[self._unsigned(nbytes)] = self._stack[-1]

    def get(self, nbytes: int) -> None:
        self._stack.append(self._memo[self._unsigned(nbytes)])

    def push_bytes(self, nbytes: int) -> None:
        self._stack.append(self._take(self._unsigned(nbytes)))

    def add_items(self) -> None:
        items = self._since_mark()
        if type(self._stack[-1]) is not set:
            raise ValueError("items for what is not a set")
        self._stack[-1].update(map(as_key, items))

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def skip_frame(self) -> None:
        """Protocol 4 says how many bytes to read ahead; here all are there, and nothing depends on it."""
        if self._unsigned(8) > len(self._data) - self._at:
            raise ValueError("a frame that leaves the file")

    def find_global(self) -> None:
        line = self._line() + b"." + self._line()
        found = self._found.get(line)
        if found is None:
            found = self._found[line] = self._named(line.decode())
        self._stack.append(found)

    def find_pushed(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str or len(module) + len(name) > 1000:
            raise ValueError("a global that is not named")
        self._stack.append(self._named(f"{module}.{name}"))

    def _named(self, name: str) -> Any:
        name = name.replace("__builtin__.", "builtins.", 1)
        found = self._known.get(name, self._added.get(name))
        if found is None:
            raise ValueError(f"{name[:100]} is not on the allow-list")
        return found

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("arguments that are not a tuple")
        apply = function.apply if type(function) is Callee else self._check_added(function)
        self._stack.append(apply(*arguments))

    def new_object(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is RecordKind and type(arguments) is tuple and not arguments:
            self._stack.append(Record(kind.name))
            return
        if type(kind) is Maker and type(arguments) is tuple:
            self._stack.append(kind.apply(*arguments))
            return
        self._check_added(kind)
        self._stack.append(kind.__new__(kind, *arguments))

    def set_state(self) -> None:
        """As `torch._weights_only_unpickler` does: attributes of the dicts of `collections`, and of added classes."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) in (OrderedDict, Counter) and type(state) is dict:
            target.__dict__.update({key: value for key, value in state.items() if type(key) is str})
            return
        if isinstance(target, Built):
            target.build(state)
            return
        self._check_added(type(target))
        if hasattr(target, "__setstate__"):
            target.__setstate__(state)
            return
        state, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
        target.__dict__.update(state or {})
        for key, value in (slots or {}).items():
            setattr(target, key, value)

    def _check_added(self, thing: Any) -> Any:
        if not any(thing is added for added in self._added.values()):
            raise ValueError(f"a use of something that is not on the allow-list, of type {type(thing).__name__}")
        return thing

    def refer(self) -> None:
        """A persistent id: ("storage", kind, key, location, elements)."""
        saved = self._stack.pop()
        if type(saved) is not tuple or len(saved) != 5 or type(saved[0]) is not str or saved[0] != "storage":
            raise ValueError("a persistent id that is not a storage")
        _, kind, key, location, count = saved
        if type(kind) is not StorageKind or type(key) is not str or type(location) is not str:
            raise ValueError("a storage that is not well-formed")
        itemsize = 1 if kind.dtype is None else kind.dtype.itemsize
        self._stack.append(Storage(kind.dtype, as_size(count) * itemsize, key))

    def pop_pair(self) -> list[Any]:
        value, key = self._stack.pop(), self._stack.pop()
        return [key, value]


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord("("): _Machine.mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("K"): _Machine.push_byte,
    ord("M"): lambda machine: machine.push(machine._unsigned(2)),
    ord("J"): lambda machine: machine.push_signed(4),
    0x8A: lambda machine: machine.push_signed(machine._unsigned(1)),
    ord("G"): _Machine.push_float,
    ord("X"): _Machine.push_text,
    ord(")"): lambda machine: machine.push(()),
    ord("t"): _Machine.make_tuple,
    0x85: lambda machine: machine.make_tuple(1),
    0x86: lambda machine: machine.make_tuple(2),
    0x87: lambda machine: machine.make_tuple(3),
    ord("]"): lambda machine: machine.push([]),
    ord("a"): lambda machine: machine.extend([machine._stack.pop()]),
    ord("e"): lambda machine: machine.extend(machine._since_mark()),
    ord("}"): lambda machine: machine.push({}),
    ord("s"): lambda machine: machine.set_items(machine.pop_pair()),
    ord("u"): lambda machine: machine.set_items(machine._since_mark()),
    ord("q"): lambda machine: machine.put(1),
    ord("r"): lambda machine: machine.put(4),
    ord("h"): lambda machine: machine.get(1),
    ord("j"): lambda machine: machine.get(4),
    ord("c"): _Machine.find_global,
    ord("R"): _Machine.call,
    0x81: _Machine.new_object,
    ord("b"): _Machine.set_state,
    ord("Q"): _Machine.refer,
}

_STEPS_OF_4 = {
    **_STEPS,
    ord("C"): lambda machine: machine.push_bytes(1),
    ord("B"): lambda machine: machine.push_bytes(4),
    0x8C: lambda machine: machine.push_text(1),
    0x8D: lambda machine: machine.push_text(8),
    0x8F: lambda machine: machine.push(set()),
    0x90: _Machine.add_items,
    0x93: _Machine.find_pushed,
    0x94: _Machine.memoize,
    0x95: _Machine.skip_frame,
}
"""With what protocols 4 and 5 add for texts, bytes, tuples, lists, dicts, sets, numbers and objects."""
