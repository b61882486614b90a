"""Whole checkpoints, as one rank loads them: the record and every digest may agree with what an attacker wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

import shardckpt as sc
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.load import Loader
from shardckpt.engine.loading.contents import Contents
from shardckpt.errors import CheckpointDamagedError, CheckpointError
from shardckpt.format.checksum import crc32
from shardckpt.format.consistency import check_manifest
from shardckpt.format.manifest import FileEntry, Manifest, decode_manifest, encode_manifest
from shardckpt.gang.local import LocalGang
from shardckpt.storage.memory import MemoryStorage
from tests.format.record.records import sign, signed
from tests.hostile.attacks import PICKLES, lying_directory, zip_with
from tests.hostile.formats import STATE, Format
from tests.hostile.mutation import HUGE, NAMES, NUMBERS, json_text, mutate_bytes, mutate_json, mutate_ops, ops_of

T = TypeVar("T")
FOLDER = "step_1"
FILE = "model.pt"
TIMEOUT = timedelta(seconds=60)


def _saved() -> dict[str, bytes]:
    storage = MemoryStorage()
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, STATE, metadata={"loss": 1.5}).result()
    keys = [f"{FOLDER}/{name}" for name in storage.list(FOLDER)]
    return {key: storage.read(key) for key in keys}


OBJECTS = _saved()
MANIFEST = decode_manifest(OBJECTS[f"{FOLDER}/manifest.json"])
ENTRY = next(file for file in MANIFEST.files if file.name == FILE)
CONTENT = OBJECTS[f"{FOLDER}/{FILE}"]


def _part(extent: Any) -> bytes:
    return CONTENT[extent[0] : extent[0] + extent[1]]


INDEX, TREE = json.loads(_part(ENTRY.index)), ops_of(_part(ENTRY.tree))
_POOL = [TREE, *map(ops_of, PICKLES)]


@dataclass(frozen=True)
class Archive:
    """A file in the place of `FILE`, and what the record says of it."""

    content: bytes
    entry: FileEntry
    whole: bool
    """Whether it is loaded to the end, which takes a millisecond, or only opened, looked at and summed up."""


def change_archive(rng: Random, pool: Any) -> Archive:
    """Another index, another tree, other bytes anywhere, another zip; mostly with digests that agree."""
    kind, entry, content = rng.random(), ENTRY, CONTENT
    assert entry.index is not None
    assert entry.tree is not None
    index, tree = _part(entry.index), _part(entry.tree)
    if kind < 0.4:
        index = json_text(rng, mutate_json(rng, INDEX)).encode()
    if kind < 0.1 or 0.4 < kind < 0.6:
        tree = b"".join(mutate_ops(rng, rng.choice(_POOL), _POOL))
    if kind < 0.6:
        at = entry.index[0]
        content = content[:at] + index + tree + content[entry.tree[0] + entry.tree[1] :]
        entry = replace(entry, index=(at, len(index), crc32(index)), tree=(at + len(index), len(tree), crc32(tree)))
    elif kind < 0.8:
        content = mutate_bytes(rng, content)
    else:
        content = rng.choice(_ZIPS) + content
        shift = len(content) - len(CONTENT)
        entry = replace(entry, index=(entry.index[0] + shift, *entry.index[1:]), tree=_shifted(entry.tree, shift))
    if rng.random() < 0.1:
        numbers = [abs(rng.choice(NUMBERS + HUGE)) for _ in range(2)]
        entry = replace(entry, **{rng.choice(("index", "tree")): (*numbers, crc32(b""))})
    agrees = rng.random() < 0.8
    entry = replace(entry, nbytes=len(content), crc=crc32(content)) if agrees else entry
    return Archive(content, entry, rng.random() < 0.125)


def _shifted(extent: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    return extent[0] + by, *extent[1:]


def _zips() -> list[bytes]:
    """What tears programs to pieces that look into zip directories."""
    plain = [("archive/data.pkl", b"".join(TREE)), ("archive/data/0", b"x" * 64)]
    bomb = zip_with([("archive/data/0", bytes(1 << 20))], deflate=True)
    names = [zip_with([*plain, (name, b"x")]) for name in NAMES if "\0" not in name and "\ud800" not in name]
    lies = [lying_directory(zip_with(plain), at, size) for at in (0, 1 << 31, -1) for size in (0, 1 << 31, -1)]
    twice = [zip_with([plain[0], plain[0], plain[1], plain[1]]), zip_with([("link:archive/data/0", b"/etc/passwd")])]
    torch.save({"w": torch.ones(3)}, buffer := io.BytesIO())
    return [bomb, *names, *lies, *twice, buffer.getvalue()]


def _quiet_zips() -> list[bytes]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile tells of names given twice
        return _zips()


_ZIPS = _quiet_zips()


def read_archive(case: Archive) -> None:
    manifest = replace(MANIFEST, files=tuple(case.entry if f.name == FILE else f for f in MANIFEST.files))
    _refused_as_damage(lambda: check_manifest(manifest))
    storage = _storage({f"{FOLDER}/{FILE}": case.content})
    if case.whole:
        return _load(storage, manifest)
    contents = Contents(storage, FOLDER, manifest)
    contents.check_sizes([FILE])
    contents.open([FILE], [FILE])
    reads = contents.frame_reads([FILE])
    storage.read_into(reads)
    contents.damaged_frames([FILE])
    contents.leaves([FILE])
    return None


def _storage(changed: dict[str, bytes]) -> MemoryStorage:
    storage = MemoryStorage("run")
    storage._objects.update(OBJECTS | changed)
    return storage


def _load(storage: MemoryStorage, manifest: Manifest) -> None:
    at = Coordinates(0, 1, 0, 1, (0,))
    gang = LocalGang()
    gang.enter("load", timeout=TIMEOUT)
    Loader(storage, gang, at, folder=FOLDER, manifest=manifest, timeout=TIMEOUT).load_everything()


def change_whole_record(rng: Random, pool: Any) -> bytes:
    """A record of a checkpoint that is there, signed."""
    content = mutate_json(rng, rng.choice(pool))
    if type(content) is not dict or rng.random() < 0.05:
        return sign(json_text(rng, content).encode()[:-1] + b",\n")
    return signed(dict(content))


def read_as_dcp(data: bytes) -> None:
    """What `dcp.load` asks of a reader before it plans, and with it all that the record makes of names and boxes."""
    storage = _storage({f"{FOLDER}/manifest.json": data})
    reader = sc.DcpReader(FOLDER, storage=storage)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    assert isinstance(metadata, Metadata)
    assert metadata.state_dict_metadata is not None
    list(metadata.planner_data or ())


def read_whole(data: bytes) -> None:
    """A load of everything that the record speaks of."""
    storage = _storage({f"{FOLDER}/manifest.json": data})
    _load(storage, _refused_as_damage(lambda: decode_manifest(data)))


def _refused_as_damage(work: Callable[[], T]) -> T:
    """As those do that call it."""
    try:
        return work()
    except ValueError as error:
        raise CheckpointDamagedError(str(error)) from error


_RECORD = json.loads(encode_manifest(MANIFEST))
_MODULES = ("contents", "load", "sources", "fetch", "integrity", "holdings", "fit", "reader", "metadata", "place")
CHECKPOINTS = (
    Format("archive", [None], change_archive, read_archive, (CheckpointError,), (*_MODULES, "index")),
    Format("dcp", [_RECORD], change_whole_record, read_as_dcp, (CheckpointError,), _MODULES, json.loads),
    Format("load", [_RECORD], change_whole_record, read_whole, (CheckpointError,), _MODULES, json.loads),
)
