"""The archive's index: what goes in comes out; lies are refused with `ValueError`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.index import (
    ITEMSIZE,
    MAX_DIMS,
    ArchiveIndex,
    StoredBox,
    StoredRecord,
    decode_index,
    encode_index,
    load_json,
)
from shardckpt.format.placement import Box

FILE_NBYTES = 1 << 50


@st.composite
def indexes(draw: st.DrawFn) -> ArchiveIndex:
    records: list[StoredRecord] = []
    for _ in range(draw(st.integers(0, 5))):
        dtype, shape = draw(st.sampled_from(sorted(ITEMSIZE))), draw(st.lists(st.integers(0, 9), max_size=4))
        nbytes = ITEMSIZE[dtype]
        for length in shape:
            nbytes *= length
        at, crc = draw(st.integers(0, 1 << 40)), draw(st.integers(0, (1 << 32) - 1))
        records.append(StoredRecord(dtype, tuple(shape), at, nbytes, crc))
    boxes = draw(st.lists(boxes_in(records), max_size=8)) if records else []
    return ArchiveIndex(tuple(records), tuple(boxes))


@st.composite
def boxes_in(draw: st.DrawFn, records: list[StoredRecord]) -> StoredBox:
    number = draw(st.integers(0, len(records) - 1))
    shape = records[number].shape
    if draw(st.booleans()):
        zeros = (0,) * len(shape)
        return StoredBox(draw(st.text()), number, shape, Box(zeros, shape, zeros))
    local = tuple(draw(st.integers(0, length)) for length in shape)
    lengths = tuple(draw(st.integers(0, length - low)) for length, low in zip(shape, local, strict=True))
    offsets = tuple(draw(st.integers(0, 1 << 40)) for _ in shape)
    whole = tuple(at + length + draw(st.integers(0, 3)) for at, length in zip(offsets, lengths, strict=True))
    return StoredBox(draw(st.text()), number, whole, Box(offsets, lengths, local))


@given(indexes())
@settings(max_examples=150, deadline=None)
def test_an_index_comes_back(index: ArchiveIndex) -> None:
    data = encode_index(index.records, index.boxes)
    assert decode_index(data, FILE_NBYTES) == index
    assert json.loads(data)["format"] == 1


@given(indexes(), st.integers(0, (1 << 32) - 1))
@settings(max_examples=50, deadline=None)
def test_its_length_does_not_depend_on_the_crcs(index: ArchiveIndex, crc: int) -> None:
    others = [StoredRecord(r.dtype, r.shape, r.at, r.nbytes, crc) for r in index.records]
    assert len(encode_index(others, index.boxes)) == len(encode_index(index.records, index.boxes))


RECORDS = (
    StoredRecord("float32", (4, 6), 4096, 96, 0xDEADBEEF),
    StoredRecord("bfloat16", (), 8192, 2, 7),
    StoredRecord("bool", (0, 3), 8256, 0, 0),
)
BOXES = (
    StoredBox("model.w", 0, (8, 6), Box((4, 0), (2, 6), (0, 0))),
    StoredBox("model.w", 0, (8, 6), Box((0, 0), (2, 6), (2, 0))),
    StoredBox("scale", 1, (), Box((), (), ())),
    StoredBox("tied", 1, (), Box((), (), ())),
    StoredBox("nothing", 2, (0, 3), Box((0, 0), (0, 3), (0, 0))),
)
DATA = encode_index(RECORDS, BOXES)


def test_boxes_by_name() -> None:
    found = decode_index(DATA, 8300).by_name()
    assert found == {"model.w": list(BOXES[:2]), "scale": [BOXES[2]], "tied": [BOXES[3]], "nothing": [BOXES[4]]}


def record(column: str, number: int, value: Any) -> Callable[[dict], None]:
    return lambda content: content["records"][column].__setitem__(number, value)


def tensor(column: str, number: int, value: Any) -> Callable[[dict], None]:
    return lambda content: content["tensors"][column].__setitem__(number, value)


def each(change: Callable[..., Any], column: str, values: Iterable[Any]) -> list[Callable[[dict], None]]:
    return [change(column, 0, value) for value in values]


def whole(*path: str, value: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def without(*path: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    "lie",
    [
        whole("format", value=2),
        whole("format", value="1"),
        whole("format", value=None),
        whole("records", value=None),
        whole("records", value=[]),
        whole("tensors", value="x"),
        without("format"),
        without("records"),
        without("tensors"),
        *(without("records", column) for column in ("dtype", "shape", "at", "nbytes", "crc32")),
        *(without("tensors", column) for column in ("name", "record", "shape", "offsets", "lengths", "local")),
        *(whole("records", column, value=None) for column in ("dtype", "shape", "at", "nbytes", "crc32")),
        *(whole("records", column, value=[]) for column in ("dtype", "shape", "at", "nbytes", "crc32")),
        *(whole("tensors", column, value=[]) for column in ("name", "record", "shape", "offsets", "local")),
        *(whole("tensors", column, value=7) for column in ("name", "record", "shape", "offsets", "local")),
        *each(record, "at", (-1, 1 << 62, 1 << 63, 10**400, 4096.0, "0", None, True, 8300)),
        *each(record, "nbytes", (-96, 95, 97, 1 << 63, 96.0, "96", None)),
        *each(record, "dtype", ("float128", "int32x", "qint8", "", None, 4, ["float32"])),
        *each(record, "shape", ([4, -6], [-4, -6], [24.0], ["4", 6], None, 24, "46", [4, 7], {})),
        record("shape", 0, [1] * (MAX_DIMS - 1) + [4, 6]),
        record("shape", 0, [1 << 61] * 100_000),
        whole("records", "crc32", value="deadbee" + "f" * 16),
        whole("records", "crc32", value="DEADBEEF" + "0" * 16),
        whole("records", "crc32", value="+eadbeef" + "0" * 16),
        whole("records", "crc32", value="dead beef" + "0" * 15),
        whole("records", "crc32", value="\u0660" * 24),
        whole("records", "crc32", value=["00000000"] * 3),
        *each(tensor, "record", (-1, 3, 1 << 70, 0.0, "0", None, False)),
        *each(tensor, "name", (None, 3, ["x"], {})),
        tensor("shape", 0, [8]),
        tensor("shape", 0, [8, 5]),
        tensor("shape", 0, [5, 6]),
        tensor("shape", 0, [8, -6]),
        tensor("offsets", 0, [7, 0]),
        tensor("offsets", 0, [-1, 0]),
        tensor("offsets", 0, [4]),
        tensor("lengths", 0, [5, 6]),
        tensor("lengths", 0, [2, 7]),
        tensor("lengths", 0, [2, 6, 1]),
        tensor("local", 1, [3, 0]),
        tensor("local", 1, [0, -1]),
        tensor("local", 1, [(1 << 62) - 1, 0]),
        tensor("local", 1, "00"),
    ],
)
def test_a_lie_is_refused(lie: Callable[[dict], None]) -> None:
    content = json.loads(DATA)
    lie(content)
    changed = json.dumps(content).encode()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"."):
        decode_index(changed, 8300)
    assert time.monotonic() - began < 5


def test_a_record_beyond_the_file_is_refused() -> None:
    last = max(r.at + r.nbytes for r in RECORDS)
    decode_index(DATA, last)
    with pytest.raises(ValueError, match=f"of a file of {last - 1}"):
        decode_index(DATA, last - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b"{}",
        b"[" * 100_000,
        b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        DATA.replace(b'"format":1', b'"format":1,"format":1'),
        DATA.replace(b'"at":[4096', b'"at":[NaN'),
        DATA.replace(b'"at":[4096', b'"at":[Infinity'),
        DATA.replace(b'"at":[4096', b'"at":[4.096e3'),
        DATA.replace(b'"at":[4096', b'"at":[' + b"9" * 100_000),
        DATA.decode().encode("utf-16"),
        b"\xff" + DATA,
        DATA + b"}",
        DATA + DATA,
    ],
)
def test_what_is_no_index(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_index(data, FILE_NBYTES)


def test_every_truncation_is_refused() -> None:
    for length in range(len(DATA)):
        with pytest.raises(ValueError, match=r"."):
            decode_index(DATA[:length], FILE_NBYTES)


@given(st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_refused_or_read_as_an_index(changes: list[tuple[int, int]]) -> None:
    """The index has no sum of its own: the record's extent holds its CRC. Here only: nothing but `ValueError`."""
    data = bytearray(DATA)
    for position, value in changes:
        data[position] = value
    try:
        index = decode_index(bytes(data), 8300)
    except ValueError:
        return
    assert all(r.at + r.nbytes <= 8300 for r in index.records)
    again = decode_index(encode_index(index.records, index.boxes), 8300)
    assert again == index


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["records", "tensors"]), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_any_json_in_any_place(value: Any, part: str, column: int) -> None:
    content = copy.deepcopy(json.loads(DATA))
    keys = sorted(content[part])
    content[part][keys[column % len(keys)]] = value
    try:
        index = decode_index(json.dumps(content).encode(), FILE_NBYTES)
    except ValueError:
        return
    assert decode_index(encode_index(index.records, index.boxes), FILE_NBYTES) == index


def test_json_that_python_would_let_pass() -> None:
    assert load_json(b'{"a": [1, 2.5, "x", null]}') == {"a": [1, 2.5, "x", None]}
    for data in (b'{"a": 1, "a": 1}', b"[NaN]", b"[-Infinity]", b'[{"b": {"a": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match=r"twice|not JSON"):
            load_json(data)
