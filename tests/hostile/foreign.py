"""Checkpoints of other programs, changed: what the importers of `tools.moving` read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from shardckpt.errors import CheckpointError
from shardckpt.storage.memory import MemoryStorage
from shardckpt.tools.moving.folders import open_source
from shardckpt.tools.moving.seam import Window
from tests.hostile.attacks import PICKLES, zip_with
from tests.hostile.dtensors import files
from tests.hostile.formats import Format
from tests.hostile.mutation import json_text, mutate_bytes, mutate_json, mutate_ops, ops_of

_MODULES = ("folders", "reading", "nesting", "combined", "shapes", "zips", "views", "foreign", "machine")

_HEADER = {
    "__metadata__": {"format": "pt", "tied": "a"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "BOOL", "shape": [], "data_offsets": [32, 33]},
    "d": {"dtype": "U8", "shape": [0, 7], "data_offsets": [33, 33]},
}
_INDEX = {"metadata": {"total_size": 33}, "weight_map": dict.fromkeys("abcd", "m.safetensors")}


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(range(33))


_GOOD = _safetensors(json.dumps(_HEADER).encode())


def change_safetensors(rng: Random, pool: Sequence[Any]) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, _GOOD)
    return _safetensors(json_text(rng, mutate_json(rng, rng.choice(pool))).encode())


def read_safetensors(data: bytes) -> None:
    _read({"m.safetensors": data})


def change_weight_map(rng: Random, pool: Sequence[Any]) -> bytes:
    return json_text(rng, mutate_json(rng, rng.choice(pool))).encode()


def read_weight_map(data: bytes) -> None:
    _read({"m.safetensors": _GOOD, "model.safetensors.index.json": data})


def _saved() -> bytes:
    weight = torch.arange(12.0).view(3, 4)
    state = {
        "model": {"w": weight, "tied": weight, "t": weight.t(), "rows": weight[1:], "p": torch.nn.Parameter(weight[0])},
        "rng": [b"x", 1 << 70, (1, 2.5)],
        "low": torch.ones(3, dtype=torch.uint16),
    }
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


_SAVED = _saved()


def _tree_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        name = next(name for name in opened.namelist() if name.endswith("/data.pkl"))
        return opened.read(name)


_OPS = ops_of(_tree_of(_SAVED))
_RANKS = [*files((2,), (Shard(0),))]
"""What two ranks saved, each a part of a tensor."""
_ALIKE = next(files((2,), (Replicate(),), whole=torch.ones(3, 7)))
"""What each of two saved, the whole."""
_RECORDS = {"0": 84, "1": 8, "2": 12}
"""The storages of the first of them: the part, the ranks of its mesh, what all have."""


def change_archive(rng: Random, pool: Sequence[tuple[bytes, ...]]) -> bytes:
    """The tree in a sound archive, mostly; or the archive."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, _SAVED)
    own = len(pool) - len(PICKLES)
    ops = mutate_ops(rng, rng.choice(pool) if rng.random() < 0.2 else pool[rng.randrange(-own, 0)], pool)
    storages = [(f"archive/data/{number}", bytes(size)) for number, size in enumerate((48, 6))]
    return zip_with([("archive/data.pkl", b"".join(ops)), ("archive/byteorder", b"little"), *storages])


def read_archive(data: bytes) -> None:
    _read({"f.pt": data})


def change_rank_file(rng: Random, pool: Sequence[tuple[bytes, ...]]) -> bytes:
    """The tree of one rank's file."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, _RANKS[0])
    ops = mutate_ops(rng, rng.choice(pool), pool)
    storages = [(f"archive/data/{key}", bytes(size)) for key, size in _RECORDS.items()]
    return zip_with([("archive/data.pkl", b"".join(ops)), ("archive/byteorder", b"little"), *storages])


def read_rank_files(data: bytes) -> None:
    """Beside that of the other, or as that of each."""
    _read({"model_0.pt": data, "model_1.pt": data if b"Replicate" in data else _RANKS[1]})


def _read(files: dict[str, bytes]) -> None:
    """All of it: whatever the file says is there can be read."""
    storage = MemoryStorage()
    for name, content in files.items():
        storage.put(name, [content])
    source = open_source(storage)
    for name, facts in source.tensors.items():
        source.read([Window(name, 0, memoryview(bytearray(facts.nbytes)))])
    source.close()


def _header_of(data: bytes) -> Any:
    return json.loads(data[8:-33])


def _ops_of(data: bytes) -> tuple[bytes, ...]:
    ops = ops_of(_tree_of(data))
    if not ops:
        raise ValueError("a tree of nothing is no seed")
    return ops


_ERRORS = (CheckpointError,)
_LINES = (*_MODULES, "safetensors_source", "archive_source")
_OF_RANKS = (*_LINES, "dtensors", "joined", "ranks")
FOREIGN = (
    Format("safetensors", [_HEADER], change_safetensors, read_safetensors, _ERRORS, _LINES, _header_of),
    Format("weight map", [_INDEX], change_weight_map, read_weight_map, _ERRORS, _LINES, json.loads),
    Format(
        "files of ranks",
        [ops_of(_tree_of(each)) for each in (_RANKS[0], _ALIKE)],
        change_rank_file,
        read_rank_files,
        _ERRORS,
        _OF_RANKS,
        _ops_of,
    ),
    Format("torch.save", [*map(ops_of, PICKLES), _OPS], change_archive, read_archive, _ERRORS, _LINES, _ops_of),
)
