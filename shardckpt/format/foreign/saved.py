"""What `torch.save` writes, found in pieces: its directory, its pickle, and where the bytes of its tensors are.

A zip archive of stored records, `<prefix>/data.pkl` and `<prefix>/data/<key>` among them. DCP puts one for each chunk
of a tensor, and for each other value, one after the other into a file: so nothing here opens a file, and places are
counted from the first byte of the archive. A tensor may lie in another order of its dimensions (transposed, channels
last).

Source: PKWARE APPNOTE 6.3.10, 4.3-4.5; `torch.serialization._save`; `torch._utils._rebuild_tensor_v2`.
"""

from __future__ import annotations

import functools
import io
import itertools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.format.index import as_size
from shardckpt.format.restricted.allowed import (
    Dialect,
    Record,
    RecordKind,
    contiguous_stride,
)
from shardckpt.format.restricted.foreign import StoredView, views_for_tensors
from shardckpt.format.restricted.machine import read_pickle

TAIL = 4096
"""Bytes of the end in which the directory of a single tensor's archive lies, many times over."""
LOCAL = 30
"""Bytes of a local header before the name."""
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_MAX32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """A stored record: its local header begins at `header`, and something else at `limit`, if not before."""

    name: str
    header: int
    limit: int
    nbytes: int
    crc: int

    def start(self, head: bytes) -> int:
        """Where its bytes begin; `head` begins with its local header. `ValueError` if that is not one of it."""
        if len(head) < LOCAL:
            raise ValueError(f"{self.name} is cut off")
        magic, _, flags, method, _, _, _, _, _, name, extra = _LOCAL.unpack_from(head)
        start = self.header + LOCAL + int(name) + int(extra)
        if magic != b"PK\x03\x04" or flags & 1 or method or start + self.nbytes > self.limit:
            raise ValueError(f"the header of {self.name} is damaged")
        return start


def is_alone(view: StoredView) -> bool:
    """Whether the record is just this tensor."""
    return not view.offset and view.nbytes == view.storage_nbytes


def order_of(view: StoredView) -> tuple[int, ...] | None:
    """Its dimensions in the order in which its bytes are row-major, without gaps; None if there is none."""
    shape, stride = view.shape, view.stride
    if view.is_contiguous:
        return tuple(range(len(shape)))
    order = tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], -shape[d], d)))
    steps = contiguous_stride(tuple(shape[d] for d in order))
    return order if all(shape[d] == 1 or stride[d] == step for d, step in zip(order, steps, strict=True)) else None


def members_of(tail: bytes, nbytes: int) -> dict[str, Member]:
    """The records of an archive of so many bytes that ends with `tail`, by their names after the first "/".

    `ValueError` if there is no such archive, if a record is compressed or given twice, or if `tail` is too little.
    """
    try:
        count, size, start = _directory(tail, nbytes)
        at = start - (nbytes - len(tail))
        if at < 0 or at + size > len(tail):
            raise ValueError("its directory is larger than it should be")
        rows: list[tuple[str, int, int, int]] = []
        for _ in range(count):
            row, at = _row(tail, at)
            rows.append(row)
    except struct.error as error:
        raise ValueError(f"its directory is damaged: {error}") from error
    if at > len(tail) - _END.size:
        raise ValueError("its directory is damaged")
    starts = sorted({header for _, header, _, _ in rows} | {start})
    limits = dict(itertools.pairwise(starts))
    if len(limits) != len(rows) or starts[-1] != start or len({row[0] for row in rows}) != len(rows):
        raise ValueError("records that overlap, or one that is given twice")
    return {name: Member(name, header, limits[header], n, crc) for name, header, n, crc in rows}


def decode_saved(pickle: bytes) -> Any:
    """The tree of a `data.pkl`, with a `StoredView` for each tensor.

    `pickle` is untrusted: `ValueError` for what is malformed, or would need to run code.
    """
    return map_values(read_pickle(pickle, _SAVED), lambda place: place)


def map_values(tree: Any, visit: Callable[[StoredView], Any]) -> Any:
    """The same values, with what `visit` gives for each tensor."""
    kind = type(tree)
    if kind is StoredView:
        return visit(tree)
    if kind is set and any(type(item) is StoredView for item in tree):
        raise ValueError("a set of tensors")
    if kind is list:
        return [map_values(item, visit) for item in tree]
    if kind is tuple:
        return tuple([map_values(item, visit) for item in tree])
    if kind in (dict, OrderedDict, Counter):
        mapped = kind({key: map_values(item, visit) for key, item in tree.items()})
        vars(mapped).update(getattr(tree, "__dict__", {})) if kind is not dict else None
        return mapped
    return _buffer(tree) if kind is Record else tree


def placed_in(tree: Any) -> list[StoredView]:
    """The tensors of a tree, each as often as it is in there."""
    found: list[StoredView] = []
    map_values(tree, found.append)
    return found


def restore(place: StoredView, content: bytearray) -> torch.Tensor:
    """The tensor, from the bytes of its record."""
    if not content:
        return torch.empty(place.shape, dtype=getattr(torch, place.dtype))
    flat = torch.frombuffer(content, dtype=torch.uint8).clone().view(getattr(torch, place.dtype))
    return flat.as_strided(place.shape, place.stride, place.offset).clone()


def _directory(tail: bytes, nbytes: int) -> tuple[int, int, int]:
    """(records, bytes, first byte) of the directory."""
    if len(tail) < _END.size or len(tail) > nbytes:
        raise ValueError("it is too short")
    magic, disk, other, _, count, size, start, comment = _END.unpack_from(tail, len(tail) - _END.size)
    if magic != b"PK\x05\x06" or comment or disk or other:
        raise ValueError("it does not end as what torch.save writes (was it saved as safetensors?)")
    locator = len(tail) - _END.size - _LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        at = _LOCATOR.unpack_from(tail, locator)[2] - (nbytes - len(tail))
        if at < 0 or at + _END64.size > len(tail) or tail[at : at + 4] != b"PK\x06\x06":
            raise ValueError("its end is damaged")
        *_, count, size, start = _END64.unpack_from(tail, at)
    return int(count), int(size), int(start)


def _row(tail: bytes, at: int) -> tuple[tuple[str, int, int, int], int]:
    """(name, local header, bytes, CRC) of the record whose central header is here, and where the next one is."""
    magic, _, _, flags, method, _, _, crc, packed, nbytes, *rest = _CENTRAL.unpack_from(tail, at)
    name_nbytes, extra_nbytes, comment_nbytes, _, _, _, header = rest
    name = tail[at + _CENTRAL.size :][:name_nbytes]
    extra = tail[at + _CENTRAL.size + name_nbytes :][:extra_nbytes]
    if magic != b"PK\x01\x02" or flags & 1 or method or len(name) + len(extra) != name_nbytes + extra_nbytes:
        raise ValueError("a record that is not just stored, or a damaged directory")
    if _MAX32 in (packed, nbytes, header):
        packed, nbytes, header = _widened(extra, (nbytes, packed, header))
    if packed != nbytes:
        raise ValueError("a record that is not just stored")
    short = name.decode("utf-8", "replace").partition("/")[2]
    return (short, header, nbytes, crc), at + _CENTRAL.size + name_nbytes + extra_nbytes + comment_nbytes


def _widened(extra: bytes, given: tuple[int, int, int]) -> tuple[int, int, int]:
    """(packed, nbytes, header), where the zip64 field has those that do not fit into 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            nbytes, packed, header = [next(wide, -1) if value == _MAX32 else value for value in given]
            if min(nbytes, packed, header) < 0:
                break
            return packed, nbytes, header
        at += 4 + length
    raise ValueError("a record of more than 4 GiB that does not say how large it is")


@functools.lru_cache(maxsize=1)
def _known() -> Mapping[str, Any]:
    """Without NumPy: `dcp.load` gives back what was saved, or nothing."""
    return {**views_for_tensors(), "_io.BytesIO": RecordKind("BytesIO")}


_SAVED = Dialect((2,), _known, additions=False)  # what others add could hide tensors


def _buffer(record: Record) -> io.BytesIO:
    """Some training programs keep one in their state; DCP stores it as it does any value."""
    state = record.state
    if record.kind != "BytesIO" or type(state) is not tuple or len(state) != 3 or type(state[0]) is not bytes:
        raise ValueError(f"an object of a class that is not known here, {record.kind}")
    buffer = io.BytesIO(state[0])
    buffer.seek(as_size(state[1]))
    return buffer
