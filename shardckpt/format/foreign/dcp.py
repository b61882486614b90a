"""The `.metadata` of a checkpoint that `torch.distributed.checkpoint` (DCP) wrote, without unpickling it.

It is a pickle (protocol 4; 5 under Python 3.14) of DCP's own dataclasses, which are only looked at here: none is made.
What changed in the years since torch 2.2, oldest first; a file does not say who wrote it, and all are read alike:

- `TensorProperties` and `MEM_FORMAT_ENCODING` were those of `torch.distributed._shard.sharded_tensor`, and moved;
- `storage_meta` came, with a `StorageMeta` whose `checkpoint_id` may be a `Path`;
- with 2.4, lists inside of dicts became keys of their own: other names, nothing else;
- `transform_descriptors` of a `_StorageInfo` came, which are there only if there are any, and `StorageMeta.modules`;
- `version` came, "1.0.0".

Source: `torch/distributed/checkpoint/metadata.py` and `filesystem.py` of these versions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from shardckpt.format.index import ITEMSIZE, MAX_DIMS, as_size, as_text
from shardckpt.format.layout import check_file_name
from shardckpt.format.placement import Piece, is_tiling
from shardckpt.format.restricted.allowed import Callee, Dialect, Record, RecordKind, known_globals
from shardckpt.format.restricted.machine import read_pickle

METADATA = ".metadata"
"""Of the whole checkpoint; a save with `use_collectives=False` has one for each rank instead, `__0.metadata`."""

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties",),
}
_ENCODINGS = (
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
)
_PATHS = tuple(
    f"{module}.{kind}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
)


@dataclass(frozen=True, slots=True)
class Payload:
    """What `torch.save` wrote, at these bytes of a file."""

    file: str
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A rectangle of a tensor, in elements, and where it lies."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    payload: Payload


@dataclass(frozen=True, slots=True)
class StoredTensor:
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]
    """In the order of the file, without empty ones; which together are the tensor only if `is_whole` says so."""

    @property
    def is_whole(self) -> bool:
        """Whether the chunks hold every element, and each once."""
        if not math.prod(self.shape):
            return not self.chunks
        return is_tiling(self.shape, [Piece(0, chunk.offsets, chunk.lengths) for chunk in self.chunks])


Entry: TypeAlias = StoredTensor | Payload
"""A tensor, or any other value, which is one payload."""


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What there is in the checkpoint."""

    entries: Mapping[str, Entry]
    paths: Mapping[str, tuple[str | int, ...]]
    """By flat name, the keys that lead to it in the nested state; (name,) where the file does not say."""


def decode_dcp_metadata(data: bytes) -> DcpMetadata:
    """`data` is untrusted: `ValueError` for whatever is malformed, or names something that is not DCP's."""
    root = read_pickle(data, Dialect((2, 3, 4, 5), _known, additions=False))
    try:
        fields = _fields(root, "Metadata")
        stored = _storage(fields.get("storage_data"))
        named = _dict(fields.get("state_dict_metadata"), "its keys")
        entries = {as_text(name): _entry(name, entry, stored) for name, entry in named.items()}
        return DcpMetadata(entries, _paths(fields.get("planner_data"), entries))
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"not the metadata of a DCP checkpoint: {type(error).__name__}: {error}") from error


_NOTHING = Callee(lambda *_: None)


def _member(owner: Any, name: Any) -> None:
    """Of a memory format, as Python 3.11.0 to 3.11.3 pickle members of an Enum; of nothing else."""
    if owner is not _NOTHING or type(name) is not str:
        raise ValueError("builtins.getattr is not on the allow-list but for memory formats")


@functools.lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    """Everything that the file may name. Of paths (where it was written) and memory formats nothing is kept."""
    own = known_globals()
    plain = {name: value for name, value in own.items() if isinstance(value, torch.dtype)}
    calls = {name: own[name] for name in ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict")}
    nothing = dict.fromkeys((*_ENCODINGS, *_PATHS), _NOTHING)
    nothing["builtins.getattr"] = Callee(_member)
    records = {f"{module}.{kind}": RecordKind(kind) for module, kinds in _RECORDS.items() for kind in kinds}
    return {**plain, **calls, **nothing, **records}


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if type(record) is not Record or record.kind != kind or type(record.state) is not dict:
        raise ValueError(f"something else where a {kind} should be")
    return record.state


def _dict(value: Any, what: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what}: something else where a dict should be")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise ValueError(f"not a tuple of at most {MAX_DIMS} sizes")
    return tuple([as_size(size) for size in value])


def _storage(value: Any) -> dict[tuple[str, tuple[int, ...] | None], Record]:
    found: dict[tuple[str, tuple[int, ...] | None], Record] = {}
    for key, info in _dict(value, "where its bytes lie").items():
        index = _fields(key, "MetadataIndex")
        offset = index.get("offset")
        found[as_text(index["fqn"]), None if offset is None else _sizes(offset)] = info
    return found


def _payload(info: Any, name: str) -> Payload:
    fields = _fields(info, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} was transformed by an extension of DCP (compressed, say): load it with DCP itself")
    file = check_file_name(as_text(fields["relative_path"]))
    return Payload(file, as_size(fields["offset"]), as_size(fields["length"]))


def _entry(name: str, entry: Any, stored: Mapping[tuple[str, tuple[int, ...] | None], Record]) -> Entry:
    if type(entry) is Record and entry.kind == "BytesStorageMetadata":
        return _payload(stored.get((name, None)), name)
    fields = _fields(entry, "TensorStorageMetadata")
    properties = fields["properties"]
    if type(properties) is not Record or properties.kind != "TensorProperties" or type(properties.state) is not tuple:
        raise ValueError(f"{name}: no well-formed TensorProperties")
    dtype = properties.state[0]
    dtype_name = str(dtype).removeprefix("torch.") if type(dtype) is torch.dtype else ""
    if dtype_name not in ITEMSIZE:
        raise ValueError(f"{name}: a dtype that cannot be stored here")
    shape, chunks = _sizes(fields["size"]), fields["chunks"]
    if type(chunks) is not list:
        raise ValueError(f"{name}: chunks that are not a list")
    placed: dict[tuple[tuple[int, ...], tuple[int, ...]], StoredChunk] = {}
    for chunk in chunks:
        box = _fields(chunk, "ChunkStorageMetadata")
        offsets, lengths = _sizes(box["offsets"]), _sizes(box["sizes"])
        if not len(offsets) == len(lengths) == len(shape):
            raise ValueError(f"{name}: a chunk of other dimensions than the tensor's")
        if math.prod(lengths):  # ranks without a share of a tensor write an empty one
            payload = _payload(stored.get((name, offsets)), name)
            placed[offsets, lengths] = StoredChunk(offsets, lengths, payload)
    return StoredTensor(dtype_name, shape, tuple(placed.values()))


def _paths(value: Any, entries: Mapping[str, Entry]) -> dict[str, tuple[str | int, ...]]:
    """What `DefaultSavePlanner` notes. Other planners may put anything there, and then names stay flat."""
    noted = value if type(value) is dict else {}
    return {name: noted[name] if _is_path(noted.get(name)) else (name,) for name in entries}


def _is_path(path: Any) -> bool:
    return type(path) is tuple and 0 < len(path) <= 256 and all(type(key) in (str, int) for key in path)
