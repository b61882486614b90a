"""The commit record: what goes in comes out, damage is noticed, it stays small."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from shardckpt.format.manifest import (
    FileEntry,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    TensorEntry,
    decode_manifest,
    decode_table,
    encode_manifest,
    encode_table,
    spelled,
)
from shardckpt.format.placement import Piece
from shardckpt.format.record.files import decode_file, encode_file
from tests.format.record.drawing import manifests, only_model
from tests.format.record.records import DATA, RECORD


@given(manifests())
@settings(max_examples=120, deadline=None)
def test_a_record_comes_back(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert json.loads(data)["world_size"] == manifest.world_size
    assert encode_manifest(decode_manifest(data)) == data


@given(manifests())
@settings(max_examples=30, deadline=None)
def test_files_and_tables_travel_as_json(manifest: Manifest) -> None:
    for file in manifest.files:
        assert decode_file(json.loads(json.dumps(encode_file(file)))) == file
    for table in manifest.tables:
        assert decode_table(json.loads(json.dumps(encode_table(table)))) == table


def test_the_example_comes_back() -> None:
    assert decode_manifest(DATA) == RECORD
    assert RECORD.parts == ("a", "model", "step")
    assert (RECORD.shards, RECORD.nbytes, RECORD.world_size) == (2, 9010, 4)


def test_what_is_as_usual_is_not_said() -> None:
    """So that a record without marks is, byte for byte, what it was before there were any, and old ones still load."""
    assert {"model_key", "model_only"}.isdisjoint(json.loads(DATA))
    marked = json.loads(encode_manifest(only_model(replace(RECORD, model_key="net"))))
    assert (marked["model_key"], marked["model_only"], marked["format"]) == ("net", True, 1)
    assert (RECORD.model_key, RECORD.model_only) == ("model", False)


def test_what_is_of_the_model() -> None:
    keys = ("model", "model.w", "model_2.w", "models", "optimizer.model.w", "mode")
    assert [key for key in keys if RECORD.is_of_model(key)] == ["model", "model.w"]


@pytest.mark.parametrize("folder", ["", "0123456789abcdef0123/"], ids=["file system", "object store"])
def test_files_of_which_no_table_speaks_are_recorded(folder: str) -> None:
    extents = ((0, 1, 2), (3, 4, 5))
    files = (
        FileEntry(f"{folder}model.pt", 9, 1, "consolidated", 0, *extents),
        FileEntry(f"{folder}metadata.1.pt", 9, 1, "metadata", 1, *extents),
        FileEntry(f"{folder}metadata.0.pt", 9, 1, "metadata", 0, None, (0, 5, 2)),
        FileEntry(f"{folder}tokenizer/vocab.json", 9, 1, "cc", 0),
    )
    record = replace(RECORD, files=files)
    assert decode_manifest(encode_manifest(record)) == record


def test_pieces_come_back() -> None:
    pieces = (Piece(3, (0, 0), (5, 4)), Piece(1, (5, 0), (3, 1)), Piece(1, (5, 1), (3, 3)))
    layouts = (RECORD.layouts[0], LayoutEntry("rank", pieces=pieces), RECORD.layouts[2])
    record = replace(RECORD, layouts=layouts)
    assert decode_manifest(encode_manifest(record)) == record


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
def test_every_flipped_byte_is_noticed(mask: int) -> None:
    for position in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[position] ^= mask
        with pytest.raises(ValueError, match="SHA-256"):
            decode_manifest(bytes(damaged))


def test_every_truncation_and_every_surplus_byte_is_noticed() -> None:
    for length in range(len(DATA)):
        with pytest.raises(ValueError, match="SHA-256"):
            decode_manifest(DATA[:length])
    for damaged in (DATA + b"\n", DATA + b"\0", b" " + DATA, DATA + DATA, DATA.replace(b"\n", b"\r\n"), DATA.rstrip()):
        with pytest.raises(ValueError, match="SHA-256"):
            decode_manifest(damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"attempt": "../x"},
        {"shard_of": ()},
        {"shard_of": (0, 1, 0, 4)},
        {"files": RECORD.files + RECORD.files[:1]},
        {"files": (replace(RECORD.files[0], name="../x"),)},
        {"files": (replace(RECORD.files[0], nbytes=4100),)},
        {"meshes": (replace(RECORD.meshes[0], shape=(2, 3)),)},
        {"layouts": RECORD.layouts[:2]},
        {"tables": (RECORD.tables[0], RECORD.tables[0])},
        {"tables": (replace(RECORD.tables[0], values={"model.w": "rank"}),)},
        {"model_only": True},
        {"files": (FileEntry("model.pt", 9, 1, "consolidated", 0),)},
        {"files": (FileEntry("model.0.pt", 9, 1, "consolidated", 0, (0, 1, 2), (3, 4, 5)),)},
        {"files": tuple(FileEntry(n, 9, 1, "consolidated", 0, (0, 1, 2), (3, 4, 5)) for n in ("model.pt", "x"))},
        {"files": (FileEntry("vocab.json", 9, 1, "cc", 0, (0, 1, 2)),)},
        {"files": (FileEntry("score.txt", 9, 1, "cc", 0),)},
        {"files": (FileEntry(f"{RECORD.attempt}/score.txt", 9, 1, "cc", 0),)},
        {"metadata": {"loss": float("nan")}},
        {"metadata": {"loss": object()}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_record_that_could_not_be_read_is_never_written(change: dict) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_manifest(replace(RECORD, **change))


def test_tables_that_keep_their_text_give_the_same_record_and_are_checked_with_what_they_stand_beside() -> None:
    kept = replace(RECORD, tables=tuple(map(spelled, RECORD.tables)))
    assert kept.parts == RECORD.parts
    for step in (RECORD.step, 7, RECORD.step):  # the first time they are checked, later they are known
        assert encode_manifest(replace(kept, step=step)) == encode_manifest(replace(RECORD, step=step))
    for change in (
        {"layouts": RECORD.layouts[:2]},
        {"meshes": (replace(RECORD.meshes[0], shape=(1, 4)),)},  # which has no replica 1
        {"shard_of": (0, 1)},
        {"tables": (replace(kept.tables[0], values={"model.w": "rank"}),)},
    ):
        with pytest.raises(ValueError, match=r"."):
            encode_manifest(replace(kept, **change))


def test_a_record_of_4096_ranks_and_1000_tensors_stays_small() -> None:
    world = 4096
    extents = ((1 << 30, 200_000, 0xFFFFFFFF), ((1 << 30) + 200_000, 100_000, 0xFFFFFFFF))
    manifest = replace(
        RECORD,
        shard_of=tuple(rank % 8 for rank in range(world)),
        files=tuple(FileEntry(f"rank_{r}.pt", 1 << 31, r * 7919, "rank", r, *extents) for r in range(world)),
        meshes=(MeshEntry(("dp", "tp"), (512, 8), tuple(range(world))),),
        tables=(
            Table(
                tuple(range(world)),
                {f"model.layers.{i}.attention.weight": TensorEntry("bfloat16", (8192, 8192), 1) for i in range(1000)},
                {"rng": "rank"},
            ),
        ),
    )
    data = encode_manifest(manifest)
    assert len(data) < 2 << 20
    assert decode_manifest(data) == manifest
    assert data.count(b'"SS(0,2)"') == 1, "placements are said once, not for each tensor or rank"
