"""Records whose sum is right and whose content is not: refused with `ValueError`, at once, in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.consistency import MAX_WORLD
from shardckpt.format.layout import LAST_STEP
from shardckpt.format.manifest import decode_manifest, encode_manifest
from tests.format.record.records import DATA, JSON, sign, signed


def put(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    change.__name__ = f"{path} = {str(value)[:40]}"
    return change


def put_each(*path: Any, values: Iterable[Any]) -> list[Callable[[dict], None]]:
    return [put(*path, value=value) for value in values]


def drop(*path: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    change.__name__ = f"without {path}"
    return change


def add(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        node: Any = content
        for key in path:
            node = node[key]
        node.append(value)

    change.__name__ = f"{path} + {str(value)[:40]}"
    return change


TENSORS = ("tables", 0, "tensors")
NO_SIZES: tuple[Any, ...] = (-1, 1 << 62, 1 << 63, 10**300, 1.0, "1", None, True, [1], {})
OTHER_NAMES: tuple[Any, ...] = (
    "../x",
    "/etc/passwd",
    "C:x",
    "a\\b",
    "a/../../b",
    "",
    ".",
    "s3://b/x",
    "a\0b",
    "manifest.json",
    None,
    3,
    [],
)
LIES = [
    *(drop(key) for key in json.loads(DATA) if key != "sha256"),
    *(put(key, value=None) for key in json.loads(DATA) if key != "sha256"),
    *(
        lie
        for key in ("files", "meshes", "layouts", "tables", "differ")
        for lie in put_each(key, values=(3, "x", [3], [[]]))
    ),
    *put_each("format", values=(0, 2, 3, "1", [])),
    *put_each("step", values=(*NO_SIZES, LAST_STEP + 1)),
    *put_each("attempt", values=("", "short", "../../../x", "ABCDEFGHIJ", "0" * 65, 12345678, [])),
    *(put(key, value=3) for key in ("created", "mesh", "versions", "metadata")),
    *put_each("world_size", values=(3, 5, "4", -1)),
    put("parts", value=["model"]),
    put("differ", value=["a", "a"]),
    *put_each("model_only", values=(True, 1, 0, "true", None, [])),
    *put_each("model_key", values=(3, None, ["model"])),
    put("files", 0, "kind", value="consolidated"),
    put("files", 0, "kind", value="cc"),
    put("files", 1, "name", value="score.txt"),
    *put_each("files", 0, "name", values=OTHER_NAMES),
    put("files", 0, "name", value="rank_3.pt"),
    put("files", 0, "name", value="cc"),
    put("files", 0, "name", value="cc/tokenizer.json/x"),
    *put_each("files", 0, "nbytes", values=NO_SIZES),
    *put_each("files", 0, "writer", values=NO_SIZES),
    put("files", 0, "writer", value=4),
    *put_each("files", 0, "crc32", values=("", "DEADBEEF", "0xdeadbe", "deadbeef0", 7, None, [])),
    put("files", 0, "kind", value=None),
    *(
        lie
        for part in ("index", "tree")
        for lie in put_each("files", 0, part, values=(3, "abc", [], [0, 1], [0, 1, 2, 3]))
    ),
    put("files", 0, "index", value=[8999, 2, "00000000"]),
    put("files", 0, "index", value=[-1, 2, "00000000"]),
    put("files", 0, "tree", value=[(1 << 62) - 1, (1 << 62) - 1, "00000000"]),
    put("files", 0, "tree", value=[0, 1, "x"]),
    put("shard_of", value=[]),
    put("shard_of", value=[[0, 0, 0]]),
    *(
        put("shard_of", value=[run])
        for run in ([0, 1, 5], [4, 0, 4], [0, -1, 4], [-1, 1, 4], ["", "x", 4], [0, 1.5, 4])
    ),
    *(put("shard_of", value=[[0, 0, count]]) for count in (MAX_WORLD + 1, 1 << 30, 1 << 61, 1 << 64, "4", -4, 4.0)),
    put("shard_of", value=[[0, "x" * 1_000_000, 1 << 20]]),
    put("shard_of", value=[[0, 10**4000, 4]]),
    put("shard_of", value=[[0, 0, 1 << 20]] * 1000),
    put("meshes", value=[{"dims": ["x"], "shape": [1 << 30], "ranks": [[0, 1, 1 << 30]]}]),
    put("meshes", value=[{"dims": ["x"], "shape": [1 << 18], "ranks": [[0, 1, 1 << 18]]}] * 5000),
    put("tables", 0, "ranks", value=[[0, 1, 1 << 40]]),
    put("meshes", 0, "shape", value=[2, 3]),
    put("meshes", 0, "shape", value=[4]),
    put("meshes", 0, "shape", value=[2, 2, 1]),
    put("meshes", 0, "shape", value=[-2, -2]),
    put("meshes", 0, "dims", value=["dp"]),
    put("meshes", 0, "dims", value=["dp", "dp"]),
    put("meshes", 0, "dims", value=["dp", 3]),
    put("meshes", 0, "ranks", value=[[0, 0, 4]]),
    put("meshes", 0, "ranks", value=[[1, 1, 4]]),
    put("meshes", 0, "ranks", value=[[0, 1, 3]]),
    put("meshes", 0, value={"dims": [], "shape": [0], "ranks": []}),
    put("layouts", 1, "home", value="elsewhere"),
    put("layouts", 1, "home", value=["rank"]),
    *put_each("layouts", 1, "mesh", values=(1, -1, 0.0, "0", False, None)),
    *(
        put("layouts", 1, "placements", value=value)
        for value in (
            [],
            ["R"],
            ["R", "R", "R"],
            ["R", "S"],
            ["R", "S(-1)"],
            ["R", "P"],
            ["R", 0],
            "RR",
            ["R", "S(0)x"],
        )
    ),
    *put_each(
        "layouts",
        1,
        "placements",
        0,
        values=("S(2)", "S(9999999)", "SS(0,0)", "SS(0)", "SS(0,1000000000)", "SS(2,2)", "S(\u0660)", "SS(0,-2)"),
    ),
    put("layouts", 0, "placements", value=["R"]),
    put("layouts", 1, "pieces", value=[[0, [0, 0], [8, 4]]]),
    *(
        put("layouts", 1, value={"home": "rank", "mesh": None, "placements": [], "pieces": pieces})
        for pieces in (
            [[0, [0, 0], [4, 4]]],
            [[0, [0, 0], [4, 4]], [1, [4, 0], [5, 4]]],
            [[0, [0, 0], [8, 4]], [1, [0, 0], [8, 4]]],
            [[0, [0, 0], [5, 4]], [1, [3, 0], [3, 4]]],
            [[4, [0, 0], [8, 4]]],
            [[0, [0], [8]]],
            [[0, [-4, 0], [8, 4]]],
            [[0, [0, 0], [8, 4.0]]],
            [[0, [0, 0]]],
            [3],
            "x",
            {"0": 1},
        )
    ),
    put("layouts", 0, "pieces", value=[[0, [], []]]),
    put(*TENSORS, "name", 0, value="model.n"),
    put(*TENSORS, "name", 0, value="a"),
    put(*TENSORS, "name", 0, value=None),
    *put_each(*TENSORS, "dtype", 0, values=("float128", "qint8", "", None, 4, [])),
    *put_each(*TENSORS, "shape", 0, values=([], [8, -4], [8, 4.0], 32, "84", None, [True, 4])),
    put(*TENSORS, "shape", 0, value=[1 << 61, 1 << 61]),
    put(*TENSORS, "shape", 0, value=[1 << 61] * 100_000),
    *put_each(*TENSORS, "layout", 0, values=(3, -1, 1 << 63, "0", None, 0.0)),
    *put_each(*TENSORS, "replica", 0, values=(1, -1, "0", None)),
    put("tables", 1, "tensors", "replica", 0, value=2),
    *(drop(*TENSORS, column) for column in ("name", "dtype", "shape", "layout", "replica")),
    *(put(*TENSORS, column, value=[]) for column in ("name", "dtype", "shape", "layout", "replica")),
    add(*TENSORS, "name", value="more"),
    put("tables", 0, "values", value={"rank": ["a"]}),
    add("tables", 0, "values", "model", value="a"),
    add("tables", 0, "values", "rank", value="a"),
    add("tables", 0, "values", "rank", value="model.w"),
    add("tables", 0, "values", "rank", value=3),
    put("tables", 0, "ranks", value=[[0, 1, 2]]),
    put("tables", 0, "ranks", value=[[2, 2, 2]]),
    put("tables", 0, "ranks", value=[[0, 0, 2]]),
    put("mesh", "dp", value=-1),
    put("versions", "torch", value=2.13),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_record_that_lies_is_refused(lie: Callable[[dict], None]) -> None:
    content = json.loads(DATA)
    decode_manifest(signed(content))
    lie(content)
    data = signed(content)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each lie has a message of its own
        decode_manifest(data)
    elapsed = time.monotonic() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "SHA-256" not in str(caught.value)
    assert 0 < len(str(caught.value)) < 1000
    assert elapsed < 10
    assert peak < (32 << 20) + 20 * len(data)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b",\n",
        b'{"format": 1, "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b",\n",
        DATA.partition(b'"sha256"')[0].replace(b'"loss":2.5', b'"loss":NaN'),
        DATA.partition(b'"sha256"')[0].replace(b'"loss":2.5', b'"loss":2.5,"loss":3'),
        DATA.partition(b'"sha256"')[0].replace(b'"step": 1000', b'"step": 1000, "step": 1000'),
        DATA.partition(b'"sha256"')[0].replace(b'"step": 1000', b'"step": ' + b"9" * 50_000),
        b"\xff\xfe",
        b"",
        b"3",
        b"{",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_signed_but_no_record(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_manifest(sign(body))


@given(JSON, st.data())
@settings(max_examples=200, deadline=None)
def test_any_json_in_any_place(value: Any, data: st.DataObject) -> None:
    content = json.loads(DATA)
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        below = node[key]
        if not isinstance(below, (dict, list)) or not below or data.draw(st.booleans()):
            node[key] = value
            break
        node = below
    try:
        found = decode_manifest(signed(content))
    except ValueError:
        return
    assert decode_manifest(encode_manifest(found)) == found
