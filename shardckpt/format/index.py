"""The index inside each archive (`shardckpt.json`): which box of which tensor lies at which bytes. No torch.

JSON, in columns, so that 20,000 tensors are a few long lists instead of 20,000 objects. The CRCs are one string
of eight digits each: the text keeps its length while they are not known yet. What is nothing special is null, in a
column or for a whole column: a shape like the record's, offsets and places of zero, lengths of the whole tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardckpt.format.checksum import all_from_hex
from shardckpt.format.placement import Box, Piece

FORMAT = 1

MAX_DIMS = 64
"""Dimensions of a tensor; torch computes with no more."""
MAX_NUMBERS = 1 << 21
"""Ranks that all lists of a record may name together: far more than any job has, far less than memory holds."""
_TOO_LARGE = 1 << 62
_CRCS = ',"crc32":"'
"""What comes before them; no name before it can hold it, for quotes in names are escaped."""

ITEMSIZE = {
    **dict.fromkeys(("bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of an element, by the name of the torch dtype: all that can be stored."""


class StoredRecord(NamedTuple):
    """One record of tensor data: a contiguous, row-major array of `shape` at bytes [at, at + nbytes)."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    nbytes: int
    crc: int


class StoredBox(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class IndexText:
    """An index without its CRCs: what stays the same from save to save, made once."""

    before: bytes
    after: bytes

    def with_crcs(self, crcs: Sequence[int]) -> bytes:
        """The index; `crcs` are those of its records. Its length does not depend on them."""
        return b"".join((self.before, struct.pack(f">{len(crcs)}I", *crcs).hex().encode(), self.after))


def encode_index(records: Sequence[StoredRecord], boxes: Sequence[StoredBox]) -> bytes:
    """JSON whose length does not depend on the CRCs."""
    return index_text(records, boxes).with_crcs([record.crc for record in records])


def index_text(records: Sequence[StoredRecord], boxes: Sequence[StoredBox]) -> IndexText:
    """The index but for the CRCs, whatever they are in `records`."""
    content = {
        "format": FORMAT,
        "records": {
            "dtype": [r.dtype for r in records],
            "shape": [r.shape for r in records],
            "at": [r.at for r in records],
            "nbytes": [r.nbytes for r in records],
            "crc32": "",
        },
        "tensors": {
            "name": [b.name for b in boxes],
            "record": [b.record for b in boxes],
            "shape": _sparse([None if b.shape == records[b.record].shape else b.shape for b in boxes]),
            "offsets": _sparse([b.box.offsets if any(b.box.offsets) else None for b in boxes]),
            "lengths": _sparse([None if b.box.lengths == b.shape else b.box.lengths for b in boxes]),
            "local": _sparse([b.box.local if any(b.box.local) else None for b in boxes]),
        },
    }
    before, crcs, after = json.dumps(content, separators=(",", ":")).partition(_CRCS)
    return IndexText((before + crcs).encode(), after.encode())


def decode_index(data: bytes, file_nbytes: int) -> ArchiveIndex:
    """The index again. `data` is untrusted: `ValueError` for whatever is not well-formed or leaves the file."""
    try:
        content = load_json(data)
        if content["format"] != FORMAT:
            raise ValueError(f"format {shown(content['format'])}, but this version reads format {FORMAT}")
        records = _decode_records(content["records"], file_nbytes)
        return ArchiveIndex(records, _decode_boxes(content["tensors"], records))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a well-formed archive index: {type(error).__name__}: {error}") from error


def load_json(data: bytes) -> Any:
    """Untrusted JSON, in UTF-8; `ValueError` also for what Python would let pass: NaN, a key given twice, any depth."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def shown(value: Any) -> str:
    """A refused value for a message. Only what is short by its type is printed: few bytes may stand for any number."""
    if type(value) in (str, int, float, bool, type(None)):
        return repr(value if type(value) is not str else value[:40])[:60]
    return f"a {type(value).__name__}"


def as_size(value: Any) -> int:
    """A count from a file: a plain number from 0 on, below 2**62; `ValueError` for anything else."""
    if type(value) is not int or not 0 <= value < _TOO_LARGE:
        raise ValueError(f"{shown(value)} should be a size")
    return value


def as_shape(values: Any) -> tuple[int, ...]:
    """A list of sizes, one for each dimension of a tensor, from a file; `ValueError` for anything else."""
    if type(values) is not list or len(values) > MAX_DIMS:
        raise ValueError(f"not a list of at most {MAX_DIMS} sizes")
    for value in values:
        if type(value) is not int or not 0 <= value < _TOO_LARGE:
            raise ValueError(f"{shown(value)} should be a size")
    return tuple(values)


def as_pieces(values: Any) -> tuple[Piece, ...]:
    """A list of [rank, offsets, lengths], from a file; `ValueError` for anything else."""
    if type(values) is not list:
        raise ValueError("a list of pieces is needed")
    return tuple([Piece(as_size(rank), as_shape(offsets), as_shape(lengths)) for rank, offsets, lengths in values])


def runs_of(numbers: Sequence[int]) -> list[list[int]]:
    """Compact form of a list of numbers, for JSON: runs of [first, step, count]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and (runs[-1][2] == 1 or number == runs[-1][0] + runs[-1][1] * runs[-1][2]):
            if runs[-1][2] == 1:
                runs[-1][1] = number - runs[-1][0]
            runs[-1][2] += 1
        else:
            runs.append([number, 0, 1])
    return runs


def count_numbers(runs: Any) -> int:
    """How many numbers runs from a file stand for; `ValueError` for what are no runs."""
    if type(runs) is not list or any(type(run) is not list or len(run) != 3 for run in runs):
        raise ValueError("a list of ranks is not well-formed")
    return sum(as_size(count) for _, _, count in runs)


def as_numbers(runs: Any) -> tuple[int, ...]:
    """The numbers that runs from a file stand for; `ValueError` for what are no runs of numbers from 0 on."""
    if count_numbers(runs) > MAX_NUMBERS:
        raise ValueError("it names more ranks than any job has")
    numbers: list[int] = []
    for first, step, count in runs:
        last = as_size(first) + step * (count - 1) if type(step) is int and count else 0
        if type(step) is not int or last < 0:
            raise ValueError("a list of ranks is not well-formed")
        numbers += range(first, first + step * count, step) if step else [first] * count
    return tuple(numbers)


def as_truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{shown(value)} should be true or false")
    return value


def as_text(value: Any) -> str:
    """A text from a file; `ValueError` for anything else."""
    if type(value) is not str:
        raise ValueError(f"{shown(value)} should be a text")
    return value


def as_texts(values: Any) -> tuple[str, ...]:
    """A list of texts, from a file; `ValueError` for anything else."""
    if type(values) is not list:
        raise ValueError("a list of texts is needed")
    return tuple([as_text(value) for value in values])


def as_json_has_it(metadata: Mapping[str, Any]) -> Any:
    """The user's own metadata, as it will be read; `ValueError` for what JSON does not have."""
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"the metadata of a checkpoint must be JSON (texts, numbers, lists, dicts): {error}"
        raise ValueError(reason) from error


def as_dtype(value: Any) -> str:
    """The name of a dtype that can be stored, from a file; `ValueError` for anything else."""
    if type(value) is not str or value not in ITEMSIZE:
        raise ValueError(f"unknown dtype {shown(value)}")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is given twice")
    return content


def _sparse(column: list[Any]) -> list[Any] | None:
    """None for a column in which there is nothing but None."""
    return None if column.count(None) == len(column) else column


def _decode_records(columns: Mapping[str, Any], file_nbytes: int) -> tuple[StoredRecord, ...]:
    crcs = all_from_hex(columns["crc32"], len(columns["at"]))
    rows = zip(columns["dtype"], columns["shape"], columns["at"], columns["nbytes"], crcs, strict=True)
    return tuple([_decode_record(row, file_nbytes) for row in rows])


def _decode_record(row: tuple[Any, ...], file_nbytes: int) -> StoredRecord:
    dtype, shape, at, nbytes = as_dtype(row[0]), as_shape(row[1]), as_size(row[2]), as_size(row[3])
    if math.prod(shape) * ITEMSIZE[dtype] != nbytes:
        raise ValueError(f"{nbytes} bytes do not make a {dtype} tensor of shape {list(shape)}")
    if at + nbytes > file_nbytes:
        raise ValueError(f"bytes {at} to {at + nbytes} of a file of {file_nbytes}")
    return StoredRecord(dtype, shape, at, nbytes, row[4])


def _decode_boxes(columns: Mapping[str, Any], records: Sequence[StoredRecord]) -> tuple[StoredBox, ...]:
    count = len(columns["name"])
    given = [columns[key] for key in ("shape", "offsets", "lengths", "local")]
    sparse = [[None] * count if column is None else column for column in given]
    rows = zip(columns["name"], columns["record"], *sparse, strict=True)
    return tuple([_decode_box(row, records) for row in rows])


def _decode_box(row: tuple[Any, ...], records: Sequence[StoredRecord]) -> StoredBox:
    name, number = as_text(row[0]), as_size(row[1])
    if number >= len(records):
        raise ValueError(f"{name}: there is no record {number}")
    inner = records[number].shape
    shape = inner if row[2] is None else as_shape(row[2])
    zeros = (0,) * len(inner)
    offsets = zeros if row[3] is None else as_shape(row[3])
    lengths = shape if row[4] is None else as_shape(row[4])
    local = zeros if row[5] is None else as_shape(row[5])
    if not len(shape) == len(offsets) == len(lengths) == len(local) == len(inner):
        raise ValueError(f"{name}: dimensions do not agree")
    for at, length, whole, low, size in zip(offsets, lengths, shape, local, inner, strict=True):
        if at + length > whole or low + length > size:
            raise ValueError(f"{name}: its box leaves the tensor or its record")
    return StoredBox(name, number, shape, Box(offsets, lengths, local))
