"""Pickles made to do harm: nothing runs, nothing large is allocated, nothing but `ValueError` comes out, at once."""

from __future__ import annotations

import os
import pickle
import resource
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.format.tree import decode_tree
from tests.format.restricted.spelling import FLOATS, HEAD, call, laughs, number, tensor, text


@pytest.fixture
def bounded() -> Iterator[None]:
    """A moment, and few MiB, by Python's count and by the system's."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    began = time.monotonic()
    yield
    elapsed = time.monotonic() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "KiB of memory grown"
    assert elapsed < 20


class Reduced:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"a": (x,)}], lambda x: {(x,): 1}])
def test_no_call_is_made(tmp_path: Path, protocol: int, wrap: Any) -> None:
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w').close()"
    attacks = [
        Reduced(os.system, f"touch {canary}"),
        Reduced(eval, touch),
        Reduced(exec, touch),
        Reduced(open, str(canary), "w"),
        Reduced(Path.touch, canary),
        Reduced(getattr, Reduced(__import__, "os"), "system"),
        Reduced(torch.load, str(canary)),
        Reduced(torch.storage._load_from_bytes, b"\x80\x02."),
        Reduced(__import__, "antigravity"),
    ]
    for attack in attacks:
        with pytest.raises(ValueError, match="pickle"):
            decode_tree(pickle.dumps(wrap(attack), protocol=protocol))
    assert not canary.exists()


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "body",
    [
        call("os", "system", text("true")),
        call("posix", "system", text("true")),
        call("nt", "system", text("true")),
        call("__builtin__", "eval", text("1")),
        call("builtins", "getattr", text("x"), text("upper")),
        call("builtins", "bytes", number(10)),
        call("builtins", "set.__class__", text("x")),
        call("torch._utils", "_rebuild_parameter", b"N", b"\x88", b"N"),
        call("torch._utils", "_rebuild_qtensor"),
        call("torch._utils", "_rebuild_wrapper_subclass", b"N"),
        call("torch._tensor", "_rebuild_from_type_v2", b"ctorch\nSize\n", b"ctorch\nSize\n", b")", b"}"),
        call("torch.distributed.device_mesh", "DeviceMesh", text("cpu"), b"]"),
        call("torch.nn.parameter", "Parameter", number(1 << 40)),
        call("torch", "Tensor", number(1 << 40)),
        call("torch", "FloatTensor", number(1 << 40)),
        call("torch.storage", "UntypedStorage", number(1 << 40)),
        call("__builtin__", "bytearray", number(1 << 40)),
        call("__builtin__", "complex", text("1"), text("2")),
        call("__builtin__", "set", text("abc")),
        call("__builtin__", "set", b"}K\x01K\x02s"),
        call("__builtin__", "set", tensor(1 << 40, (1 << 40,), (1,))),
        call("collections", "OrderedDict", tensor(1 << 40, (1 << 39, 2), (2, 1))),
        call("collections", "OrderedDict", b"](" + tensor(1 << 40, (1 << 40,), (1,)) + b"e"),
        call("collections", "Counter", tensor(1 << 40, (1 << 40,), (1,))),
        call("torch", "Size", tensor(1 << 40, (1 << 40,), (1,))),
        call("torch", "Size", b"(" + number(-1) + b"t"),
        call("torch", "device", text("no such device")),
        call("torch.serialization", "_get_layout", text("no such layout")),
        call("_codecs", "encode", text("x"), text("zip")),
        call("_codecs", "encode", text("\u20ac"), text("latin1")),
        b"ctorch\nSize\n(tt\x81",
        b"ccollections\nOrderedDict\n)\x81",
        b"ccollections\nOrderedDict\n}b",
        b"]}b",
        b"}](K\x01K\x02eb",
        tensor(1, (1,), (1,)) + b"}b",
        tensor(1, (1,), (1,)) + b"a",
        b"ccollections\nOrderedDict\n",
        FLOATS,
        b"(" + text("storage") + FLOATS + text("0") + text("cpu") + number(1) + b"tQ",
        b"(" + text("module") + FLOATS + text("0") + text("cpu") + number(1) + b"tQ",
        text("storage") + b"Q",
        b"K\x01Q",
        b"Pid\n",
        b"\x82\x01",
        b"(ios\nsystem\n",
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo",
        b"\x8c\x02os\x8c\x06system\x93",
        b"}ccollections\nOrderedDict\nK\x01s",
        b"}]K\x01s",
        b"](K\x01K\x02u",
        b"}(K\x01u",
        b"}K\x01a",
        b"K\x01K\x02",
        b"(K\x01",
        b"0",
        b"1",
        b"h\x05",
        b"q\x05",
        b"",
    ],
)
def test_what_is_not_on_the_list_or_not_well_formed_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="pickle"):
        decode_tree(HEAD + body + b".")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "body",
    [
        tensor(-1, (1,), (1,)),
        tensor(10, (11,), (1,)),
        tensor(10, (5,), (1,)),
        tensor(10, (5, 2), (1, 5)),
        tensor(10, (10,), (0,)),
        tensor(10, (-10,), (1,)),
        tensor(1 << 63, (1 << 63,), (1,)),
        tensor(0, (1 << 62, 0, 1 << 62), (0, 1, 1)),
        tensor(1, (1,) * 65, (1,) * 65),
        tensor(1, (1,), (1,), storage=b"ctorch\nQInt8Storage\n"),
        tensor(1, (1,), (1,), storage=b"ctorch.storage\nTypedStorage\n"),
        tensor(4, (4,), (1,), storage=b"ctorch.storage\nUntypedStorage\n"),
    ],
)
def test_tensors_that_are_no_whole_contiguous_storage(body: bytes) -> None:
    with pytest.raises(ValueError, match="pickle"):
        decode_tree(HEAD + body + b".")


@pytest.mark.usefixtures("bounded")
def test_a_claim_of_4_tb_costs_nothing() -> None:
    found = decode_tree(HEAD + tensor(1 << 40, (1 << 40,), (1,)) + b".")
    assert (found.shape, found.is_meta, found.dtype) == ((1 << 40,), True, torch.float32)


@pytest.mark.usefixtures("bounded")
def test_a_claim_of_4_tb_of_text_or_memo_costs_nothing() -> None:
    for body in (
        b"X\xff\xff\xff\xff",
        b"N" + b"r\xff\xff\xff\xff",
        b"\x8a\xff",
        b"j\xff\xff\xff\xff",
        b"T\xff\xff\xff\x7f",
    ):
        for tail in (b"", b"."):
            try:
                assert decode_tree(HEAD + body + tail) is None
            except ValueError:
                continue


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "body",
    [
        laughs(60),
        laughs(60, b"]"),
        b"}" + laughs(60) + b"K\x01s",
        b"](" + laughs(60) + b"e",
        laughs(60) + b")R",
        laughs(60) + b")\x81",
        laughs(60) + b"}b",
        laughs(60) + b"Q",
        b"(" + text("storage") + laughs(60) + text("0") + text("cpu") + number(1) + b"tQ",
        b"c__builtin__\nset\n](" + laughs(60) + b"e\x85R",
        b"c_codecs\nencode\n" + laughs(60) + text("latin1") + b"\x86R",
        b"ccollections\nOrderedDict\n](" + laughs(60) + b"K\x01\x86e\x85R",
        b"ccollections\nOrderedDict\n)R}" + laughs(60) + b"K\x01sb",
        b"]q\x00h\x00a",
        b"}q\x00K\x01h\x00s",
        b"ccollections\nOrderedDict\n)Rq\x00}" + text("a") + b"h\x00sb",
        b"]" * 100_000 + b"a" * 99_999,
        b"(" * 100_000 + b"t" * 100_000,
        b"}K\x01" * 50_000 + b"}" + b"s" * 50_000,
        b"N" + b"\x85" * 1_000,
        b"N" * 1_000_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_structures_that_unfold_without_end(body: bytes) -> None:
    """Sharing, rings and depth: what reads, hashes, prints or walks them by recursion would never come back."""
    with pytest.raises(ValueError, match="pickle") as caught:
        decode_tree(HEAD + body + b".")
    assert len(str(caught.value)) < 1000
