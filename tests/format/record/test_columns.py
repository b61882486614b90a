"""Files in columns: what goes in comes out, other forms still load, lies are refused, and no object for each file."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.manifest import FORMAT_IN_COLUMNS, FileEntry, Manifest, decode_manifest, encode_manifest
from shardckpt.format.record import columns
from shardckpt.format.record.columns import MANY, FileColumns, FilesByName
from tests.format.record.drawing import CRCS, blob
from tests.format.record.records import RECORD, signed

WORLD = 200


@st.composite
def families(draw: st.DrawFn) -> list[FileEntry]:
    """Of ranks, and of what ranks hold alike; some with indexes of other lengths than the rest, some files alone."""
    made = []
    folder = draw(st.sampled_from(["", f"{RECORD.attempt}/"]))
    for kind, before in (("rank", "rank_"), ("model", "model."), ("replicated", "replicated.")):
        numbers = draw(st.sets(st.integers(0, WORLD - 1), max_size=12))
        indexed, widest = draw(st.booleans()), draw(st.sampled_from([0, 200, 70_000, 1 << 33, (1 << 62) - 1]))
        for number in sorted(numbers):
            nbytes = draw(st.integers(0, widest))
            at = draw(st.integers(0, nbytes))
            extent = (at, draw(st.integers(0, nbytes - at)), draw(CRCS)) if indexed else None
            writer = number if kind == "rank" else draw(st.integers(0, WORLD - 1))
            made.append(FileEntry(f"{folder}{before}{number}.pt", nbytes, draw(CRCS), kind, writer, extent, extent))
    made.append(FileEntry(f"{folder}tokenizer/vocab_2.json", 9, 1, "cc", 0))
    if draw(st.booleans()):
        made.append(blob("frozen_rank_1.pt", "frozen_rank", draw(CRCS)))
    return draw(st.permutations(made))


@pytest.fixture
def few() -> Iterator[int]:
    """Three files are many."""
    before, columns.MANY = columns.MANY, 3
    yield columns.MANY
    columns.MANY = before


def record_of(files: Any) -> Manifest:
    return replace(RECORD, shard_of=(0,) * WORLD, files=tuple(files), meshes=(), layouts=RECORD.layouts[:1], tables=())


@pytest.mark.usefixtures("few")
@given(files=families())
@settings(max_examples=150, deadline=None)
def test_files_come_back(files: list[FileEntry]) -> None:
    record = record_of(files)
    data = encode_manifest(record)
    again = decode_manifest(data)
    assert again == record
    assert encode_manifest(again) == data
    assert sorted(again.files, key=str) == sorted(files, key=str)
    assert [again.files[i] for i in range(len(files))] == [*again.files] == [*again.files[:]]
    assert again.files[-1] == [*again.files][-1]
    assert (again.nbytes, again.shared_nbytes) == (record.nbytes, record.shared_nbytes)
    told, plain = FilesByName(again.files), FilesByName(record.files)
    assert all(told.get(file.name) == plain.get(file.name) == file for file in files)
    assert told.get("rank_200.pt") is told.get("rank_01.pt") is told.get("x") is None
    assert told.last_writer == plain.last_writer
    for rank in range(0, WORLD, 40):
        assert told.written_by(rank) == plain.written_by(rank)
    parts = [told.every(7, start=rank) for rank in range(7)]
    assert sorted(name for part in parts for name in part) == sorted(file.name for file in files)


def many(count: int = MANY) -> Manifest:
    return record_of(FileEntry(f"rank_{r}.pt", 1 << 31, r, "rank", r, (8, 9, r), (20, 9, r)) for r in range(count))


def test_few_files_are_lines_that_a_person_reads() -> None:
    content = json.loads(encode_manifest(many(MANY - 1)))
    assert content["format"] == 1
    assert content["files"][3]["name"] == "rank_3.pt"
    assert json.loads(encode_manifest(many()))["format"] == FORMAT_IN_COLUMNS


def test_many_files_in_lines_load_as_they_did_before_there_were_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MANY", 1 << 30)
    old = encode_manifest(many(300 - 100))
    assert json.loads(old)["format"] == 1
    monkeypatch.undo()
    assert decode_manifest(old) == many(200)


@pytest.mark.parametrize("index", [True, False])
def test_a_file_takes_a_few_digits_and_no_object(index: bool) -> None:
    """Of 10,000 files more than of 5,000: bytes of the record, and objects that the collector has to look at."""
    found = []
    for count in (5_000, 10_000):
        record = replace(many(count), shard_of=(0,) * count)
        if not index:
            record = replace(record, files=tuple(replace(file, index=None) for file in record.files))
        data = encode_manifest(record)
        gc.collect()
        before = len(gc.get_objects())
        decoded = decode_manifest(data)
        found.append((len(data), len(gc.get_objects()) - before))
        assert isinstance(decoded.files, FileColumns)
    assert (found[1][0] - found[0][0]) / 5_000 <= (32 if index else 24)
    assert found[1][1] - found[0][1] < 50


def lies() -> Iterator[tuple[str, Callable[[dict], None]]]:
    def put(*path: Any, value: Any) -> Callable[[dict], None]:
        def change(files: dict) -> None:
            node: Any = files
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value

        return change

    one = ("families", 0)
    yield "no numbers", put(*one, "numbers", value=[])
    yield "too many numbers", put(*one, "numbers", value=[[0, 1, 1 << 30]])
    yield "a number twice", put(*one, "numbers", value=[[0, 0, MANY]])
    yield "a number of nine digits more", put(*one, "numbers", value=[[10**9, 1, MANY]])
    yield "another kind", put(*one, "kind", value="consolidated")
    yield "a name that leaves", put(*one, "name", value=["../rank_", ".pt"])
    yield "a name that ends in a number", put(*one, "name", value=["rank_1", ".pt"])
    yield "a name with a folder behind", put(*one, "name", value=["rank_", "/x.pt"])
    yield "no name", put(*one, "name", value=["rank_"])
    yield "a writer that is none", put(*one, "writer", value=[WORLD, 0, ""])
    yield "a writer below all", put(*one, "writer", value=[-1, 0, ""])
    yield "another width", put(*one, "nbytes", value=[0, 3, "00" * 3 * MANY])
    yield "a width that is none", put(*one, "nbytes", value=[0, True, "00" * MANY])
    yield "too few digits", put(*one, "nbytes", value=[0, 1, "00" * (MANY - 1)])
    yield "spaces for digits", put(*one, "nbytes", value=[0, 1, "  " * MANY])
    yield "letters for digits", put(*one, "nbytes", value=[0, 1, "zz" * MANY])
    yield "sizes beyond all", put(*one, "nbytes", value=[1 << 61, 8, "4000000000000000" * MANY])
    yield "files too small for their index", put(*one, "nbytes", value=[10, 0, ""])
    yield "an index without sums", put(*one, "index", value=[[8, 0, ""], [9, 0, ""]])
    yield "sums of others", put(*one, "crc32", value="0" * 8 * (MANY + 1))
    yield "the same family twice", lambda files: files["families"].append(files["families"][0])
    yield (
        "a file that is in a family",
        lambda files: files["others"].append(
            {"name": "rank_3.pt", "nbytes": 9, "crc32": "0" * 8, "kind": "cc", "writer": 0}
        ),
    )
    yield (
        "a folder that is a file of a family",
        lambda files: files["others"].append(
            {"name": "rank_3.pt/x", "nbytes": 9, "crc32": "0" * 8, "kind": "cc", "writer": 0}
        ),
    )
    yield "no families", put("families", value=[])
    yield "families of no kind", put("families", value=7)


@pytest.mark.parametrize("change", [pytest.param(change, id=what) for what, change in lies()])
def test_a_lie_is_refused(change: Callable[[dict], None]) -> None:
    content = json.loads(encode_manifest(many()))
    change(content["files"])
    with pytest.raises(ValueError, match=r"."):
        decode_manifest(signed(content))


def test_a_record_of_many_families_is_read_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """No save makes one. It must not take hours to read, either: each name is looked at once or twice."""
    content, count, looked = json.loads(encode_manifest(many())), 200, 0
    one = content["files"]["families"][0]
    plain = {"numbers": [[0, 0, 1]], "nbytes": [99, 0, ""], "crc32": "0" * 8, "index": None, "tree": None}
    content["files"] = {
        "families": [{**one, **plain, "name": [f"f{n}_", ".pt"]} for n in range(count)],
        "others": [
            {"name": f"x{n}/y{n}", "nbytes": 9, "crc32": "0" * 8, "kind": "cc", "writer": 0} for n in range(count)
        ],
    }
    parse = columns.parse_name

    def counted(name: str) -> Any:
        nonlocal looked
        looked += 1
        return parse(name)

    monkeypatch.setattr(columns, "parse_name", counted)
    files = decode_manifest(signed(content)).files
    assert all(FilesByName(files).get(f"f{n}_0.pt") for n in range(count))
    assert looked <= 4 * count


def test_the_form_is_that_of_the_format() -> None:
    content = json.loads(encode_manifest(many()))
    content["format"] = 1
    with pytest.raises(ValueError, match="format"):
        decode_manifest(signed(content))
