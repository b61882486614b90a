"""Few bytes that stand for a lot of work or memory: refused at once, each as somebody would send it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading import sources as sources_module
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.manifest import LayoutEntry, Manifest, MeshEntry, Table, TensorEntry, decode_manifest
from shardckpt.format.restricted import measure
from shardckpt.format.tree import decode_tree, encode_tree
from shardckpt.run import card
from shardckpt.run.card import CARD, read_model_card
from shardckpt.storage.memory import MemoryObjects
from tests.format.record.records import DATA, RECORD, signed
from tests.format.restricted.spelling import FLOATS, HEAD, call, laughs, number, tensor, text
from tests.hostile.checkpoints import ENTRY, FILE, MANIFEST, change_archive
from tests.hostile.watch import bounded_memory

MOST_S = 20.0
"""Processor seconds: these took minutes, or never ended; they take milliseconds."""


@pytest.fixture(autouse=True)
def soon_and_small() -> Iterator[None]:
    began = time.process_time()
    with bounded_memory() as grown:
        yield
        assert grown() < 256 << 20
    assert time.process_time() - began < MOST_S


@pytest.mark.parametrize(
    "body",
    [
        call("torch", "Size", b"(" + laughs(60) + b"t"),
        b"(" + text("storage") + FLOATS + text("0") + text("cpu") + laughs(60) + b"tQ",
        tensor(4, (4,), (1,)).replace(number(4), laughs(60), 1),
        call("torch", "device", laughs(60)),
        call("torch", "device", text("cpu"), laughs(60)),
    ],
)
def test_what_is_refused_is_not_printed_if_it_unfolds(body: bytes) -> None:
    with pytest.raises(ValueError, match="pickle") as caught:
        decode_tree(HEAD + body + b".")
    assert len(str(caught.value)) < 1000


SHARED = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
CONFIG = "model_config: {_set_: {a: 1}}\n"


@pytest.mark.parametrize(
    "content",
    [
        SHARED + "name: *a29\nmodel_family: f\n" + CONFIG,
        SHARED + "name: n\nmodel_family: f\nnum_shards: *a29\n" + CONFIG,
        SHARED + "name: n\nmodel_family: f\nmodel_config: {_set_: *a29}\n",
        MERGED + "name: n\nmodel_family: f\n" + CONFIG,
        "name: n\nmodel_family: f\n" + CONFIG + "# " + "x" * (5 << 20),
    ],
    ids=["name", "shards", "config", "merges", "size"],
)
def test_a_card_that_unfolds(content: str) -> None:
    storage = MemoryObjects("run")
    storage.put(CARD, [content.encode()])
    with pytest.raises(sc.CheckpointLoadError, match="not a model card") as caught:
        read_model_card(storage)
    assert len(str(caught.value)) < 1000


def test_a_card_that_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_LONGEST", 1000)
    storage = MemoryObjects()
    with pytest.raises(sc.InvalidStateError, match="shorten the config"):
        card.write_model_card(storage, family="f", config={"a": "x" * 1000})
    assert not storage.list()


def test_as_many_tables_as_layouts() -> None:
    record = json.loads(DATA)
    table = record["tables"][0]
    empty: dict[str, Any] = {part: {key: [] for key in table[part]} for part in ("tensors", "values")}
    ranks = 2_000
    record["world_size"], record["shard_of"] = ranks, [[0, 0, ranks]]
    record["tables"] += [{**empty, "ranks": [[rank, 0, 1]]} for rank in range(4, ranks)]
    record["layouts"] += [record["layouts"][1]] * 3_000
    assert len(decode_manifest(signed(record)).tables) == ranks - 2


def test_a_table_of_no_rank() -> None:
    record = json.loads(DATA)
    record["tables"][0]["ranks"] = []
    with pytest.raises(ValueError, match="no rank holds"):
        decode_manifest(signed(record))


def of_shards(placements: tuple[str, ...], ranks: int, rows: int) -> Manifest:
    """The record of one sharded tensor, in a few hundred bytes however many ranks there are."""
    numbers = tuple(range(ranks))
    return replace(
        RECORD,
        shard_of=(0,) * ranks,
        meshes=(MeshEntry(("a",), (ranks,), numbers),),
        layouts=(LayoutEntry("rank", 0, placements),),
        tables=(Table(numbers, {"model.w": TensorEntry("uint8", (rows,), 0)}, {}),),
        files=(),
        differ=(),
    )


@pytest.mark.parametrize(("factor", "rows"), [(60_000, 10**9), (99_999, 10**6)])
def test_a_shard_in_more_pieces_than_can_be_counted(factor: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "_MOST_CHUNKS", min(50_000, sources_module._MOST_CHUNKS))
    sources = Sources(of_shards((f"SS(0,{factor})",), 1 << 14, rows), Coordinates(0, 1, 0, 1, (0,)))
    with pytest.raises(ValueError, match="pieces"):
        sources.chunks("model.w", "first")


def test_ranks_that_hold_nothing_of_many_pieces_cost_nothing() -> None:
    sources = Sources(of_shards(("SS(0,20000)",), 1 << 12, 20_000 * 2 - 1), Coordinates(0, 1, 0, 1, (0,)))
    assert len(sources.chunks("model.w", "first")) == 20_000 * 2 - 1


def test_many_ranks_with_one_piece_each_are_no_bomb() -> None:
    sources = Sources(of_shards(("S(0)",), 1 << 12, 10**9), Coordinates(0, 1, 0, 1, (0,)))
    assert len(sources.chunks("model.w", "first")) == 1 << 12


@pytest.mark.parametrize("part", ["index", "tree"])
def test_a_file_that_is_not_as_large_as_the_record_says(part: str) -> None:
    """No memory is taken for what another rank's file is only said to hold."""
    claims = replace(ENTRY, nbytes=1 << 42, **{part: (0, 1 << 41, 0)})
    storage = MemoryObjects("run")
    storage.put(f"step_1/{FILE}", [b"x" * 100])
    contents = Contents(storage, "step_1", replace(MANIFEST, files=(claims,)))
    with pytest.raises(sc.CheckpointDamagedError, match="bytes, but"):
        contents.open([FILE] if part == "index" else [], [FILE] if part == "tree" else [])


@pytest.fixture
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as too much to walk is less here than in earnest, so that these tests are soon done."""
    monkeypatch.setattr(measure, "MAX_NODES", 1 << 16)
    with pytest.raises(ValueError, match="unfolds"):
        decode_tree(HEAD + laughs(17) + b".")


@pytest.mark.parametrize(
    "value",
    [
        [[0] * 300] * 300,
        {"a": [[[1, 2]] * 150] * 300},
        ([b"", 1] * 150,) * 300,
        [[[[["x"] * 17] * 17] * 17] * 17],
    ],
    ids=["rows", "dicts", "empty bytes", "deep"],
)
def test_what_shares_a_lot_can_be_read_again(value: Any, small_bombs: None) -> None:
    """Such a value was saved in a few bytes, committed, and then refused as a bomb."""
    pickle = encode_tree({"value": value, "more": value})
    assert decode_tree(pickle)["value"] == value


def test_a_state_that_shares_a_lot_is_loaded_again(tmp_path: Path, small_bombs: None) -> None:
    row = [0] * 300
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(2), "v": {"table": [row] * 300}}).result()
        state: dict[str, Any] = {"w": torch.zeros(2), "v": {"table": []}}
        checkpoints.load(1, state)
    assert len(state["v"]["table"]) == 300
    assert state["v"]["table"][7] == row


def test_what_shares_little_is_spelled_as_it_is() -> None:
    row = [1, 2, 3]
    back = decode_tree(encode_tree([row, row]))
    assert back[0] is back[1], "what is shared stays shared"


def test_changes_of_archives_keep_their_seed() -> None:
    from random import Random

    assert change_archive(Random(5), None) == change_archive(Random(5), None)
