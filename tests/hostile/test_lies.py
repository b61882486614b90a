"""Files that are well-formed, with digests that agree, and that contradict one another."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.carry import read_metadata
from shardckpt.engine.loading.fetching.fetch import check_region
from shardckpt.engine.loading.integrity import Region
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.manifest import FileEntry, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, encode_tree
from shardckpt.storage.memory import MemoryObjects
from tests.hostile.checkpoints import (
    CONTENT,
    ENTRY,
    FILE,
    FOLDER,
    INDEX,
    OBJECTS,
    TREE,
    Archive,
    _storage,
    read_archive,
)


def with_index(index: Any) -> Archive:
    """The file with another index, and a record in which every size and digest is that of the new file."""
    assert ENTRY.index is not None
    assert ENTRY.tree is not None
    at, text, tree = ENTRY.index[0], json.dumps(index).encode(), b"".join(TREE)
    content = CONTENT[:at] + text + tree + CONTENT[ENTRY.tree[0] + ENTRY.tree[1] :]
    extents = {"index": (at, len(text), crc32(text)), "tree": (at + len(text), len(tree), crc32(tree))}
    return Archive(content, replace(ENTRY, nbytes=len(content), crc=crc32(content), **extents), whole=True)


def test_the_file_as_it_is_loads() -> None:
    read_archive(with_index(INDEX))


def test_a_dtype_that_is_not_that_of_the_record_is_no_silent_cast() -> None:
    index = copy.deepcopy(INDEX)
    index["records"]["dtype"][index["records"]["dtype"].index("float32")] = "int32"
    with pytest.raises(sc.CheckpointLoadError, match=r"do not say the same of model\.w"):
        read_archive(with_index(index))


def test_a_shape_that_is_not_that_of_the_record_is_refused() -> None:
    index = copy.deepcopy(INDEX)
    number = index["records"]["shape"].index([6, 4])
    index["records"]["shape"][number] = [4, 6]
    with pytest.raises(sc.CheckpointError):
        read_archive(with_index(index))


@pytest.mark.parametrize(
    ("start", "lengths", "dtype"),
    [((1, 0), (6, 4), "float32"), ((0,), (6,), "float32"), ((0, 0), (6, 4), "int32"), ((0, 5), (1, 0), "float32")],
)
def test_regions_that_are_not_in_their_record(start: tuple[int, ...], lengths: tuple[int, ...], dtype: str) -> None:
    record, entry = StoredRecord("float32", (6, 4), 0, 96, 0), TensorEntry(dtype, (6, 4), 0)
    check_region(record, Region((1, 1), (5, 3)), replace(entry, dtype="float32"), file="f", name="w")
    with pytest.raises(ValueError, match="do not say the same of w"):
        check_region(record, Region(start, lengths), entry, file="f", name="w")


def test_files_that_are_gone_are_told_as_damage_by_all_that_dcp_asks_for() -> None:
    storage = _storage({})
    reader = sc.DcpReader(FOLDER, storage=storage)
    assert len(list(reader.read_metadata().planner_data or ())) > 3
    storage.delete([f"{FOLDER}/{FILE}"])
    paths = sc.DcpReader(FOLDER, storage=storage).read_metadata().planner_data
    assert f"{FOLDER}/{FILE}" in OBJECTS
    with pytest.raises(sc.CheckpointDamagedError, match=FILE):
        list(paths or ())


def test_metadata_with_a_tensor_that_is_said_to_be_larger_than_its_record() -> None:
    """Nothing is made of 4 TB for a record of no bytes."""
    tree = encode_tree({"w": TensorRef(0, torch.float32, (1 << 40,))})
    index = encode_index([StoredRecord("float32", (0,), 0, 0, 0)], [StoredBox("w", 0, (0,), Box((0,), (0,), (0,)))])
    content = index + tree
    extents = (0, len(index), crc32(index)), (len(index), len(tree), crc32(tree))
    storage = MemoryObjects("run")
    storage.put("step_1/metadata.pt", [content])
    entry = FileEntry("metadata.pt", len(content), crc32(content), "metadata", 0, *extents)
    with pytest.raises(sc.CheckpointDamagedError, match="as another one"):
        read_metadata(storage, "step_1", entry, step=1)
