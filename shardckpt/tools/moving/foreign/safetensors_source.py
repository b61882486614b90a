"""Read safetensors: one file, or the files that an index of Hugging Face names. No torch, and not `safetensors`.

A file is 8 bytes (the length of the header), a header in JSON, and the tensors one after the other, row by row.
Source of the format: the README of `safetensors`, and `Metadata::validate` in its `tensor.rs`. It has no checksums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.format.index import ITEMSIZE, as_shape, as_size, as_text, load_json, shown
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.moving.foreign.reading import (
    as_name,
    check_window,
    explained,
    merged,
    named,
    read_bytes,
    read_weight_map,
)
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window

INDEX_ENDING = ".safetensors.index.json"

MOST_HEADER = 100_000_000
"""Bytes of a header; `safetensors` reads no more."""

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Its names of dtypes, and torch's. Those of less than a byte are not read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies."""

    key: str
    at: int
    facts: TensorFacts


@dataclass(slots=True)
class Header:
    """What one file says of itself."""

    places: dict[str, Place] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


class SafetensorsSource:
    """A model's state by the names that its file gives, as `state_dict()` has them.

    Tensors that `safetensors.torch.save_model` has left out, because they are the same as another, are ties: it notes
    them in the file's metadata. The storage is the caller's.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        """`key`: a file, or an index (`*.safetensors.index.json`) of several.

        `CheckpointNotFoundError` if it is not there, `CheckpointDamagedError` if it is not well-formed.
        """
        self._storage = storage
        with explained(named(storage, key)):
            headers = self._headers(key)
        self._places = {name: headers[file].places[name] for name, file in self._found.items()}
        self._ties: dict[str, str] = {}
        for header in headers.values():
            kept = {name: of for name, of in header.metadata.items() if name not in self._places and of in self._places}
            self._ties |= kept
        self.metadata = {key: text for header in headers.values() for key, text in header.metadata.items()}
        """The texts that came with it, of all files together."""

    def _headers(self, key: str) -> Mapping[str, Header]:
        if not key.endswith(INDEX_ENDING):
            headers = {key: read_header(self._storage, key)}
            self._found = dict.fromkeys(headers[key].places, key)
            return headers
        weight_map = read_weight_map(self._storage, key)
        headers = {}
        for file in dict.fromkeys(weight_map.values()):
            with explained(named(self._storage, file)):
                headers[file] = read_header(self._storage, file)
        self._found = merged({file: list(header.places) for file, header in headers.items()}, weight_map)
        return headers

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {name: place.facts for name, place in self._places.items()}

    @property
    def ties(self) -> Mapping[str, str]:
        return dict(self._ties)

    @property
    def tree(self) -> Any:
        return {name: TensorName(name) for name in (*self._places, *self._ties)}

    def read(self, windows: Sequence[Window]) -> None:
        reads = []
        for window in windows:
            place = self._places[self._ties.get(window.name, window.name)]
            check_window(window, place.facts)
            reads.append(Read(place.key, place.at + window.start, window.into))
        with explained(f"a file of {self._storage.url}"):
            self._storage.read_into(reads)

    def close(self) -> None:
        """Nothing is held."""


def read_header(storage: Storage, key: str) -> Header:
    """The header of one file. `ValueError` for whatever is not well-formed; errors of the storage as they are."""
    nbytes = storage.size(key)
    if nbytes < 8:
        raise ValueError(f"a file of {nbytes} bytes")
    length = int.from_bytes(read_bytes(storage, key, 0, 8), "little")
    if not 2 <= length <= min(MOST_HEADER, nbytes - 8):
        raise ValueError(
            f"a header of {length} bytes in a file of {nbytes}, and {MOST_HEADER} are the most there may be"
        )
    content = load_json(read_bytes(storage, key, 8, length))
    if type(content) is not dict:
        raise ValueError("a header that is no JSON object")
    header = Header(metadata=_metadata(content.pop("__metadata__", {})))
    for name, entry in content.items():
        header.places[as_name(name)] = _place(key, 8 + length, name, entry)
    _check_cover(header, 8 + length, nbytes)
    return header


def _metadata(content: Any) -> dict[str, str]:
    if type(content) is not dict or any(type(text) is not str for text in content.values()):
        raise ValueError("metadata that are no texts")
    return {as_name(key): as_text(text) for key, text in content.items()}


def _place(key: str, begin: int, name: str, entry: Any) -> Place:
    if type(entry) is not dict or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:200]}: dtype, shape or data_offsets are missing")
    if type(entry["dtype"]) is not str or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name[:200]}: the dtype {shown(entry['dtype'])} is not read")
    facts = TensorFacts(DTYPES[entry["dtype"]], as_shape(entry["shape"]))
    offsets = as_shape(entry["data_offsets"])
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(facts.shape) * ITEMSIZE[facts.dtype]:
        raise ValueError(f"{name[:200]}: bytes {offsets} are not a {facts.dtype} tensor of its shape")
    return Place(key, begin + as_size(offsets[0]), facts)


def _check_cover(header: Header, begin: int, nbytes: int) -> None:
    """The tensors lie one after the other to the end of the file, and share no byte."""
    position = begin
    for name, place in sorted(header.places.items(), key=lambda item: (item[1].at, item[1].facts.nbytes)):
        if place.at != position:
            what = "overlaps another tensor" if place.at < position else "comes after bytes that belong to no tensor"
            raise ValueError(f"{name[:200]} {what}")
        position += place.facts.nbytes
    if position != nbytes:
        raise ValueError(f"its tensors end at byte {position}, but the file has {nbytes}")
