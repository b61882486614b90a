"""Damaged, random and half-sensible pickles: `ValueError`, or something that torch reads too."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import _weights_only_unpickler as restricted

from shardckpt.format.tree import decode_tree
from tests.format.restricted.spelling import FLOATS, HEAD, REBUILD, good, number, tensor, text


def test_every_truncation_and_every_surplus_byte_is_noticed() -> None:
    data = good()
    assert decode_tree(data)["rng"][0] == b"bytes"
    for length in range(len(data)):
        with pytest.raises(ValueError, match="pickle"):
            decode_tree(data[:length])
    for surplus in (b".", b"N", b"\0", data):
        with pytest.raises(ValueError, match="pickle"):
            decode_tree(data + surplus)


def outcome(data: bytes) -> None:
    """Refused with `ValueError`, or read; and what is read, torch's own restricted reader gives as the same type."""
    try:
        found = decode_tree(data)
    except ValueError:
        return
    reader: Any = restricted.Unpickler(io.BytesIO(data), encoding="utf-8")
    reader.persistent_load = meta_storage
    assert type(reader.load()) is type(found)


def meta_storage(saved: Any) -> Any:
    """How torch itself makes storages where a file is mapped to the meta device."""
    _, kind, _, _, numel = saved
    dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
    untyped = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_bytes(data: bytes) -> None:
    outcome(data)
    outcome(HEAD + data + b".")


@given(st.lists(st.tuples(st.integers(0, len(good()) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=250, deadline=None)
def test_a_good_pickle_with_some_bytes_changed(changes: list[tuple[int, int]]) -> None:
    data = bytearray(good())
    for position, value in changes:
        data[position] = value
    outcome(bytes(data))


GLOBALS = [
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"c__builtin__\nset\n",
    b"c__builtin__\nbytearray\n",
    b"c__builtin__\ncomplex\n",
    b"c_codecs\nencode\n",
    b"ctorch\nSize\n",
    b"ctorch\ndevice\n",
    b"ctorch\nfloat32\n",
    b"ctorch.serialization\n_get_layout\n",
    b"ctorch.storage\nUntypedStorage\n",
    REBUILD,
    FLOATS,
]
STEPS = st.sampled_from(
    [bytes([code]) for code in b"(NK)t]ae}su\x81\x85\x86\x87\x88RbQ"]
    + [b"K\x02", b"q\x00", b"h\x00", b"q\x01", b"h\x01", text("a"), text("storage"), text("latin1"), text("cpu")]
    + [number(1 << 61), number(-1), b"G" + struct.pack(">d", 1.5), tensor(1 << 40, (1 << 40,), (1,))]
    + GLOBALS
)


VALUES = st.sampled_from(
    [b"K\x02", b"N", text("a"), b"(K\x01K\x02t", b"](K\x01h\x00e", tensor(6, (2, 3), (3, 1)), *GLOBALS]
)


@given(st.lists(st.tuples(VALUES, VALUES), max_size=5), VALUES)
@settings(max_examples=150, deadline=None)
def test_random_calls(items: list[tuple[bytes, bytes]], last: bytes) -> None:
    """Well-formed more often than not: a tuple of calls with one argument each."""
    calls = [callee + argument + b"\x85R" for callee, argument in items]
    outcome(HEAD + b"(" + b"".join(calls) + last + b"t.")


@given(st.lists(STEPS, max_size=25))
@settings(max_examples=400, deadline=None)
@example([GLOBALS[0], b")", b"R", b"}", b"b"])
@example([b"]", b"q\x00", b"h\x00", b"a"])
def test_random_programs(steps: list[bytes]) -> None:
    outcome(HEAD + b"".join(steps) + b".")
