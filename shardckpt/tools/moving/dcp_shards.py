"""What DCP's `HuggingFaceStorageWriter` leaves when each rank saves its shards: safetensors that say where they belong.

There is no `.metadata`; each file tells the offsets of its tensors in a text of its own, and how large a tensor is
follows from the shards alone, as torch has it. Source: `torch/distributed/checkpoint/hf_storage.py`, `_hf_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from shardckpt.engine.dcp.foreign.folder import DcpFolder, Told
from shardckpt.engine.dcp.foreign.locating import Located
from shardckpt.engine.loading.fetching.fetch import NO_SUM
from shardckpt.format.foreign.dcp import DcpMetadata, Payload, StoredChunk, StoredTensor
from shardckpt.format.index import StoredRecord, as_shape, load_json
from shardckpt.storage.base import Storage
from shardckpt.tools.moving.foreign.reading import explained, named
from shardckpt.tools.moving.foreign.safetensors_source import Place, read_header

_SHARD = re.compile(r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def are_shards(names: Iterable[str]) -> bool:
    """Whether these are the names in such a folder."""
    return any(_SHARD.fullmatch(name) for name in names)


def open_shards(storage: Storage, folder: str, names: Iterable[str]) -> DcpFolder:
    """The folder, of which these are the names. Errors as those of `DcpFolder`."""
    chunks: dict[str, list[StoredChunk]] = {}
    located: dict[Payload, Located] = {}
    dtypes: dict[str, str] = {}
    for file in sorted(name for name in names if _SHARD.fullmatch(name)):
        key = f"{folder}/{file}" if folder else file
        with explained(named(storage, key)):
            header = read_header(storage, key)
            info = _info(header.metadata.get(_INFO, "{}"))
            for name, place in header.places.items():
                if dtypes.setdefault(name, place.facts.dtype) != place.facts.dtype:
                    raise ValueError(f"{name[:200]} has another dtype than in other files")
                chunk = _chunk(file, place, info.get(name))
                if place.facts.nbytes:
                    order = tuple(range(len(chunk.lengths)))
                    record = StoredRecord(place.facts.dtype, chunk.lengths, place.at, place.facts.nbytes, NO_SUM)
                    located[chunk.payload] = Located(file, record, order)
                chunks.setdefault(name, []).append(chunk)
    entries = {name: _tensor(dtypes[name], parts) for name, parts in chunks.items()}
    return DcpFolder(storage, folder, told=Told(DcpMetadata(entries, {name: (name,) for name in entries}), located))


def _info(text: str) -> dict[str, Any]:
    """The offsets of each tensor of a file, unchecked."""
    content = load_json(text.encode())
    if type(content) is not dict or not all(type(entry) is dict for entry in content.values()):
        raise ValueError(f"{_INFO} is not well-formed")
    return {name: entry.get("saved_offsets", "none") for name, entry in content.items()}


def _chunk(file: str, place: Place, offsets: object) -> StoredChunk:
    shape = place.facts.shape
    start = (0,) * len(shape) if offsets is None else as_shape(offsets)
    if len(start) != len(shape):
        raise ValueError("offsets of other dimensions than the tensor's")
    return StoredChunk(start, shape, Payload(file, place.at, place.facts.nbytes))


def _tensor(dtype: str, parts: list[StoredChunk]) -> StoredTensor:
    ends = [[at + n for at, n in zip(part.offsets, part.lengths, strict=True)] for part in parts]
    shape = tuple(max(sides) for sides in zip(*ends, strict=False))
    own = {(part.offsets, part.lengths): part for part in parts if part.payload.nbytes}  # copies are one
    return StoredTensor(dtype, shape, tuple(own.values()))
