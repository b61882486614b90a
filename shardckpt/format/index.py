"""The index inside each archive (`shardckpt.json`): which box of which tensor lies at which bytes. No torch.

JSON, in columns, so that 20,000 tensors are a few long lists instead of 20,000 objects. The CRCs are one string
of eight digits each: the text keeps its length while they are not known yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardckpt.format.checksum import from_hex, to_hex
from shardckpt.format.placement import Box

FORMAT = 1

ITEMSIZE = {
    **dict.fromkeys(("bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of an element, by the name of the torch dtype: all that can be stored."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One record of tensor data: a contiguous, row-major array of `shape` at bytes [at, at + nbytes)."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of the tensor `name` (of global `shape`) that lies in record number `record`."""

    name: str
    record: int
    shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class ArchiveIndex:
    """What one archive holds. Tied tensors share a record."""

    records: tuple[StoredRecord, ...]
    boxes: tuple[StoredBox, ...]

    def by_name(self) -> dict[str, list[StoredBox]]:
        found: dict[str, list[StoredBox]] = {}
        for stored in self.boxes:
            found.setdefault(stored.name, []).append(stored)
        return found


def encode_index(records: Sequence[StoredRecord], boxes: Sequence[StoredBox]) -> bytes:
    """JSON whose length does not depend on the CRCs."""
    local = [None if not any(b.box.local) else list(b.box.local) for b in boxes]
    content = {
        "format": FORMAT,
        "records": {
            "dtype": [r.dtype for r in records],
            "shape": [r.shape for r in records],
            "at": [r.at for r in records],
            "nbytes": [r.nbytes for r in records],
            "crc32": "".join(to_hex(r.crc) for r in records),
        },
        "tensors": {
            "name": [b.name for b in boxes],
            "record": [b.record for b in boxes],
            "shape": [b.shape for b in boxes],
            "offsets": [b.box.offsets for b in boxes],
            "lengths": [b.box.lengths for b in boxes],
            "local": local if any(local) else None,
        },
    }
    return json.dumps(content, separators=(",", ":")).encode()


def decode_index(data: bytes, file_nbytes: int) -> ArchiveIndex:
    """The index again. `data` is untrusted: `ValueError` for whatever is not well-formed or leaves the file."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, but this version reads format {FORMAT}")
        records = _decode_records(content["records"])
        boxes = _decode_boxes(content["tensors"])
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a well-formed archive index: {type(error).__name__}: {error}") from error
    for record in records:
        _check_record(record, file_nbytes)
    for stored in boxes:
        _check_box(stored, records)
    return ArchiveIndex(records, boxes)


def _decode_records(columns: dict[str, Any]) -> tuple[StoredRecord, ...]:
    crcs = columns["crc32"]
    rows = zip(columns["dtype"], columns["shape"], columns["at"], columns["nbytes"], strict=True)
    if len(crcs) != 8 * len(columns["at"]):
        raise ValueError("as many CRCs as records are needed")
    return tuple(
        StoredRecord(dtype, _ints(shape), at, nbytes, from_hex(crcs[8 * i : 8 * i + 8]))
        for i, (dtype, shape, at, nbytes) in enumerate(rows)
    )


def _decode_boxes(columns: dict[str, Any]) -> tuple[StoredBox, ...]:
    names = columns["name"]
    local = columns["local"] or [None] * len(names)
    rows = zip(names, columns["record"], columns["shape"], columns["offsets"], columns["lengths"], local, strict=True)
    return tuple(
        StoredBox(str(name), record, _ints(shape), Box(_ints(at), _ints(size), _ints(inner or (0,) * len(at))))
        for name, record, shape, at, size, inner in rows
    )


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{values!r} should be sizes")
    return tuple(values)


def _check_record(record: StoredRecord, file_nbytes: int) -> None:
    _ints((record.at, record.nbytes))
    if record.dtype not in ITEMSIZE:
        raise ValueError(f"unknown dtype {record.dtype!r}")
    if math.prod(record.shape) * ITEMSIZE[record.dtype] != record.nbytes:
        raise ValueError(f"{record.nbytes} bytes do not make a {record.dtype} tensor of shape {list(record.shape)}")
    if record.at + record.nbytes > file_nbytes:
        raise ValueError(f"bytes {record.at} to {record.at + record.nbytes} of a file of {file_nbytes}")


def _check_box(stored: StoredBox, records: Sequence[StoredRecord]) -> None:
    if type(stored.record) is not int or not 0 <= stored.record < len(records):
        raise ValueError(f"{stored.name}: there is no record {stored.record!r}")
    box, inner = stored.box, records[stored.record].shape
    if not len(stored.shape) == len(box.offsets) == len(box.lengths) == len(box.local) == len(inner):
        raise ValueError(f"{stored.name}: dimensions do not agree")
    for at, length, whole, low, size in zip(box.offsets, box.lengths, stored.shape, box.local, inner, strict=True):
        if at + length > whole or low + length > size:
            raise ValueError(f"{stored.name}: its box leaves the tensor or its record")
