"""A record that is reduced to the model names every file with a byte of it, and loads like the whole one did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.index import ITEMSIZE, ArchiveIndex, StoredBox, StoredRecord
from shardckpt.format.manifest import (
    FileEntry,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    TensorEntry,
    decode_manifest,
    encode_manifest,
)
from shardckpt.format.placement import Box
from shardckpt.format.reduced import NoModelError, Reduced, may_be_doomed, reduce_to_model
from tests.format.record.drawing import saves
from tests.format.record.records import RECORD


def keys_of(manifest: Manifest) -> set[str]:
    return {key for table in manifest.tables for key in (*table.tensors, *table.values)}


def loaders(manifest: Manifest) -> Iterable[Sources]:
    """Every rank of the same job, and ranks of others."""
    world, shards = manifest.world_size, manifest.shards
    for rank in range(world):
        yield Sources(manifest, Coordinates(rank, world, manifest.shard_of[rank], shards, (rank,)))
    for at in (Coordinates(0, 1, 0, 1, (0,)), Coordinates(1, 2, 1, 2, (1,)), Coordinates(world, world + 1, 0, 1, (0,))):
        yield Sources(manifest, at)


def needed(manifest: Manifest) -> set[str]:
    """The files from which tensors and values of the model are read, by whoever may load it."""
    found: set[str] = set()
    for sources in loaders(manifest):
        for name in filter(manifest.is_of_model, keys_of(manifest)):
            if sources.tensor(name, "first") is not None:
                for whole in (False, True):
                    found |= {file for file, _ in sources.chunks(name, "first", whole=whole)}
            else:
                rank, home = sources.part_rank([name], "first"), sources.value_home(name)
                assert rank is not None
                assert home is not None
                found.add(sources.files_of(rank, home))
    return found


def check(manifest: Manifest, reduced: Reduced) -> None:
    """What holds of every reduction."""
    made = reduced.manifest
    assert decode_manifest(encode_manifest(made)) == made
    names, doomed = {file.name for file in manifest.files}, {file.name for file in reduced.doomed}
    assert {file.name for file in made.files} == names - doomed
    assert doomed <= names
    own = [file.name for file in reduced.doomed if not file.blob]
    assert all(may_be_doomed(name.rpartition("/")[2]) for name in own), "so that leftovers can be told by their names"
    assert {file.name for file in manifest.files if file.kind in ("cc", "of tomorrow")} <= names - doomed
    assert keys_of(made) == {key for key in keys_of(manifest) if manifest.is_of_model(key)}
    assert made.model_only
    same = {"step", "attempt", "created", "metadata", "versions", "model_key"}
    assert all(getattr(made, name) == getattr(manifest, name) for name in same)
    assert reduce_to_model(made) == Reduced(made, ())


@settings(max_examples=150, deadline=None)
@given(saves())
def test_no_file_with_a_byte_of_the_model_goes(manifest: Manifest) -> None:
    encode_manifest(manifest)
    try:
        reduced = reduce_to_model(manifest)
    except NoModelError:
        assert not any(map(manifest.is_of_model, keys_of(manifest)))
        return
    check(manifest, reduced)
    doomed = {file.name for file in reduced.doomed}
    assert doomed.isdisjoint(needed(manifest))
    assert needed(reduced.manifest) <= {file.name for file in reduced.manifest.files}
    holders = {key: holders_of(manifest, key) for key in keys_of(reduced.manifest)}
    assert holders == {key: holders_of(reduced.manifest, key) for key in keys_of(reduced.manifest)}


def holders_of(manifest: Manifest, key: str) -> dict[int, object]:
    """By rank, what it held under this key, spelled out."""
    held: dict[int, object] = {}
    for table in manifest.tables:
        what: object = table.values.get(key)
        if key in table.tensors:
            entry = table.tensors[key]
            layout = manifest.layouts[entry.layout]
            mesh = manifest.meshes[layout.mesh] if layout.mesh is not None else None
            what = (entry.dtype, entry.shape, entry.replica, replace(layout, mesh=None), mesh)
        if what is not None:
            held |= dict.fromkeys(table.ranks, what)
    return held


def index_of(tensors: dict[str, TensorEntry]) -> ArchiveIndex:
    """Of a file that holds these, each whole."""
    records = [
        StoredRecord(entry.dtype, entry.shape, 0, entry.shape[0] * entry.shape[1] * ITEMSIZE[entry.dtype], 0)
        for entry in tensors.values()
    ]
    boxes = [
        StoredBox(name, number, entry.shape, Box((0, 0), entry.shape, (0, 0)))
        for number, (name, entry) in enumerate(tensors.items())
    ]
    return ArchiveIndex(tuple(records), tuple(boxes))


def consolidated(manifest: Manifest) -> tuple[Manifest, dict[str, TensorEntry]]:
    """With a file that has the model once more, and its tensors. Of names that are used twice the first one counts."""
    prefix = f"{manifest.attempt}/" if any(f.name.startswith(manifest.attempt) for f in manifest.files) else ""
    file = FileEntry(f"{prefix}model.pt", 99, 7, "consolidated", manifest.world_size - 1, (0, 9, 1), (9, 9, 2))
    tensors: dict[str, TensorEntry] = {}
    for table in manifest.tables:
        tensors = {key: entry for key, entry in table.tensors.items() if manifest.is_of_model(key)} | tensors
    return replace(manifest, files=(*manifest.files, file)), tensors


@settings(max_examples=100, deadline=None)
@given(saves(("rank", "replicated")))
def test_a_consolidated_file_is_all_that_stays_and_has_all(manifest: Manifest) -> None:
    manifest = replace(manifest, differ=())
    manifest, tensors = consolidated(manifest)
    for table in manifest.tables:
        assume(tensors.keys().isdisjoint(table.values))
        alike = [tensors[key] for key in table.tensors if key in tensors]
        own = [entry for key, entry in table.tensors.items() if key in tensors]
        assume([(e.dtype, e.shape) for e in own] == [(e.dtype, e.shape) for e in alike])
    assume(tensors)
    for index in (index_of(tensors), None):
        reduced = reduce_to_model(manifest, consolidated=index)
        check(manifest, reduced)
        assert not reduced.mixed
        (file,) = [file for file in reduced.manifest.files if file.kind not in ("cc", "of tomorrow")]
        assert (file.kind, file.crc) == ("model", 7)
        assert needed(reduced.manifest) == {file.name}
        for sources in loaders(reduced.manifest):
            for name, entry in tensors.items():
                found = sources.tensor(name)
                assert found is not None
                assert (found.dtype, found.shape) == (entry.dtype, entry.shape)
                assert sources.chunks(name, "fail") == [(file.name, Box((0, 0), entry.shape, (0, 0)))]


@settings(max_examples=60, deadline=None)
@given(saves(("rank", "replicated")), st.data())
def test_a_consolidated_file_that_lacks_anything_stands_for_nothing(manifest: Manifest, data: st.DataObject) -> None:
    manifest, tensors = consolidated(manifest)
    name = data.draw(st.sampled_from(sorted(tensors))) if tensors else None
    assume(name is not None)
    assert name is not None
    entry = tensors[name]
    others = {key: kept for key, kept in tensors.items() if key != name}
    part = StoredBox(name, 0, entry.shape, Box((0, 0), (entry.shape[0], entry.shape[1] - 1), (0, 0)))
    wrong = [index_of({**others, name: replace(entry, dtype="bool" if entry.dtype != "bool" else "int8")})]
    if entry.shape[0] and entry.shape[1]:
        record = StoredRecord(entry.dtype, part.box.lengths, 0, 0, 0)
        wrong += [index_of(others), ArchiveIndex((record,), (part,))]
    for index in wrong:
        reduced = reduce_to_model(manifest, consolidated=index)
        check(manifest, reduced)
        assert {file.name for file in reduced.doomed}.isdisjoint(needed(manifest))
        assert "consolidated" in {file.kind for file in reduced.manifest.files}


# By example: what a reader can check by hand

FSDP = Manifest(
    step=7,
    attempt="0123456789abcdef0123",
    created="2026-11-22T10:00:00Z",
    shard_of=(0, 0),
    files=(
        FileEntry("rank_0.pt", 100, 1, "rank", 0),
        FileEntry("rank_1.pt", 100, 1, "rank", 1),
        FileEntry("replicated.pt", 10, 1, "replicated", 1),
        FileEntry("metadata.pt", 10, 1, "metadata", 0),
        FileEntry("config.json", 10, 1, "cc", 0),
    ),
    meshes=(MeshEntry(("dp",), (2,), (0, 1)),),
    layouts=(LayoutEntry("replicated"), LayoutEntry("rank", 0, ("S(0)",))),
    tables=(
        Table((0,), {"model.w": TensorEntry("float32", (8, 4), 1)}, {"model.extra": "rank", "step": "replicated"}),
        Table((1,), {"model.w": TensorEntry("float32", (8, 4), 1)}, {"model.extra": "rank", "only 1": "rank"}),
    ),
    mesh_sizes={"data": 2, "model": 1},
    metadata={"loss": 2.5},
)
WHOLE = FileEntry("model.pt", 128, 3, "consolidated", 1, (0, 9, 1), (9, 9, 2))


def test_shards_of_the_model_keep_the_files_that_they_lie_in() -> None:
    reduced = reduce_to_model(FSDP)
    assert [file.name for file in reduced.doomed] == ["replicated.pt", "metadata.pt"]
    assert reduced.manifest == replace(
        FSDP,
        files=(*FSDP.files[:2], FSDP.files[4]),
        layouts=FSDP.layouts[1:],
        tables=(Table((0, 1), {"model.w": TensorEntry("float32", (8, 4), 0)}, {"model.extra": "rank"}),),
        model_only=True,
    )
    assert "in no file of its own" in reduced.mixed


def test_a_consolidated_model_looks_as_if_one_process_had_saved_it() -> None:
    reduced = reduce_to_model(replace(FSDP, files=(*FSDP.files, WHOLE)))
    assert [file.name for file in reduced.doomed] == ["rank_0.pt", "rank_1.pt", "replicated.pt", "metadata.pt"]
    assert reduced.manifest == replace(
        FSDP,
        shard_of=(0,),
        files=(replace(WHOLE, kind="model", writer=0), FSDP.files[4]),
        meshes=(),
        layouts=(LayoutEntry("model"),),
        tables=(Table((0,), {"model.w": TensorEntry("float32", (8, 4), 0)}, {"model.extra": "model"}),),
        mesh_sizes={"data": 1, "model": 1},
        model_only=True,
    )
    assert reduced.mixed == ""


def test_what_is_a_value_here_and_a_tensor_there_is_in_no_consolidated_file() -> None:
    tensors = {"model.w": TensorEntry("float32", (8, 4), 1)}
    tables = (Table((0,), tensors, {"step": "rank"}), Table((1,), {}, {"model.w": "rank"}))
    reduced = reduce_to_model(replace(FSDP, files=(*FSDP.files, WHOLE), tables=tables))
    assert [file.name for file in reduced.manifest.files] == ["rank_0.pt", "rank_1.pt", "config.json", "model.pt"]
    assert "model.w" in reduced.mixed


@pytest.mark.parametrize("key", ["model.w", "model.extra"])
def test_what_differs_between_ranks_is_in_no_consolidated_file(key: str) -> None:
    record = replace(FSDP, files=(*FSDP.files, WHOLE), differ=(key, "only 1"))
    reduced = reduce_to_model(record)
    assert [file.name for file in reduced.manifest.files] == ["rank_0.pt", "rank_1.pt", "config.json", "model.pt"]
    assert reduced.manifest.differ == (key,)
    assert key in reduced.mixed


def test_a_model_of_which_only_the_consolidated_file_knows() -> None:
    tables = (Table((0, 1), {}, {"step": "replicated"}),)
    record = replace(FSDP, files=(*FSDP.files, WHOLE), tables=tables)
    index = index_of({"model.w": TensorEntry("float32", (8, 4), 0), "ema.w": TensorEntry("float32", (8, 4), 0)})
    reduced = reduce_to_model(record, consolidated=index)
    assert list(reduced.manifest.tables[0].tensors) == ["model.w"]
    assert len(reduced.doomed) == 4
    for nothing in (None, index_of({"ema.w": TensorEntry("float32", (8, 4), 0)})):
        with pytest.raises(NoModelError, match=r"step 7 .* no tensor of 'model'"):
            reduce_to_model(record, consolidated=nothing)


def test_a_model_in_files_of_its_own_keeps_these() -> None:
    files = tuple(FileEntry(n, 9, 1, k, 0) for n, k in [("model.0.pt", "model"), ("model.1.pt", "model"), *TP_OTHERS])
    layouts = (LayoutEntry("model", 0, ("R", "S(0)")), LayoutEntry("replicated"))
    tensors = {"net.w": TensorEntry("float32", (8, 4), 0), "optimizer.m": TensorEntry("float32", (8, 4), 1)}
    tables = (Table((0, 1, 2, 3), tensors, {"net.extra": "model"}),)
    record = replace(RECORD, files=files, layouts=layouts, tables=tables, differ=("net.extra",), model_key="net")
    reduced = reduce_to_model(record)
    assert [file.name for file in reduced.doomed] == [name for name, _ in TP_OTHERS]
    assert reduced.mixed == ""
    assert (reduced.manifest.layouts, reduced.manifest.differ) == (layouts[:1], ("net.extra",))


TP_OTHERS = [("rank_3.pt", "rank"), ("replicated.0.pt", "replicated"), ("replicated.1.pt", "replicated")]


def test_the_key_of_the_model_may_be_given() -> None:
    record = replace(RECORD, model_key="net")
    with pytest.raises(NoModelError, match=r"'net': it has a, model, step"):
        reduce_to_model(record)
    assert reduce_to_model(record, model_key="model").manifest.model_key == "model"


def test_a_step_that_has_nothing_but_its_model_keeps_everything() -> None:
    tensors = {"model.w": TensorEntry("float32", (8, 4), 1)}
    record = replace(FSDP, files=FSDP.files[:2], tables=(Table((0, 1), tensors, {}),))
    reduced = reduce_to_model(record)
    assert (reduced.doomed, reduced.mixed) == ((), "")
    assert reduced.manifest.files == record.files


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *((name, True) for name in ("model.pt", "model.12.pt", "rank_0.pt", "replicated.pt", "metadata.3.pt")),
        *(
            (name, False)
            for name in ("rank.pt", "rank_0.pt.bak", "model.x.pt", "amodel.pt", "score.txt", "model.1.2.pt")
        ),
        *((name, False) for name in ("manifest.json", "rank_0/", "rank_\u0661.pt", "x/rank_0.pt", "model.pt\n")),
    ],
)
def test_names_that_may_be_left_over(name: str, ours: bool) -> None:
    assert may_be_doomed(name) == ours
