"""Which files a transaction makes, what lies in each, and that every rank gets back what it gave.

The rules, and the table of the first test, are those of fairseq2 0.4 (its documentation and `FileCheckpointManager`),
except that a rank's own file has the number of the global rank.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import shardckpt as sc
from shardckpt.format.manifest import decode_manifest
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from tests.manager.transactions import (
    Size,
    equal,
    files_in,
    is_declared,
    on_ranks,
    opened,
    state_of,
    transact,
)

SIZES = [Size(dp, tp) for dp in (1, 2, 4) for tp in (1, 2)]
EVERYTHING = ("model", "optimizer", "step_nr", "epoch")
CASES: list[set[str] | None] = [
    None,
    {"epoch"},
    {"*"},
    {"model"},
    {"model", "optimizer"},
    {"optimizer", "step_nr", "epoch"},
    {"model", "*"},
    {"of another program"},
]


def expected_files(size: Size, replicated: Collection[str], model_key: str = "model") -> dict[str, set[str]]:
    """The archives of a step, and the top-level keys of each."""
    files: dict[str, set[str]] = {}
    for rank in range(size.ranks):
        shard = f".{rank % size.tp}" if size.tp > 1 else ""
        left = {model_key, *EVERYTHING} - ({"model"} - {model_key})
        if size.dp == 1 or is_declared(model_key, replicated):
            files[f"model{shard}.pt"] = {model_key, "model_key"}
            left -= {model_key}
        alike = {key for key in left if is_declared(key, replicated)}
        if alike:
            files[f"replicated{shard}.pt"] = alike
        left -= alike
        if left:
            files[f"rank_{rank}.pt"] = left | ({"model_key"} if model_key in left else set())
    return files


REST = {"optimizer", "step_nr", "epoch"}
MODEL = {"model", "model_key"}


def told(value: Size | Collection[str]) -> str:
    """The same in every process, which the text of a set is not."""
    return str(value) if isinstance(value, Size) else " ".join(sorted(value)) or "none"


@pytest.mark.parametrize(
    ("size", "replicated", "files"),
    [
        (Size(1), (), {"model.pt": MODEL, "rank_0.pt": REST}),
        (Size(1), {"epoch"}, {"model.pt": MODEL, "rank_0.pt": {"optimizer", "step_nr"}, "replicated.pt": {"epoch"}}),
        (Size(1), {"*"}, {"model.pt": MODEL, "replicated.pt": REST}),
        (Size(2), (), {"rank_0.pt": MODEL | REST, "rank_1.pt": MODEL | REST}),
        (
            Size(2),
            {"epoch"},
            dict.fromkeys(("rank_0.pt", "rank_1.pt"), MODEL | {"optimizer", "step_nr"}) | {"replicated.pt": {"epoch"}},
        ),
        (
            Size(2),
            {"model", "optimizer"},
            {
                "model.pt": MODEL,
                "replicated.pt": {"optimizer"},
                "rank_0.pt": {"step_nr", "epoch"},
                "rank_1.pt": {"step_nr", "epoch"},
            },
        ),
        (Size(2), {"*"}, {"model.pt": MODEL, "replicated.pt": REST}),
        (
            Size(1, 2),
            (),
            {"model.0.pt": MODEL, "model.1.pt": MODEL, "rank_0.pt": REST, "rank_1.pt": REST},
        ),
        (
            Size(1, 2),
            {"*"},
            {"model.0.pt": MODEL, "model.1.pt": MODEL, "replicated.0.pt": REST, "replicated.1.pt": REST},
        ),
        (
            Size(2, 2),
            {"model"},
            {"model.0.pt": MODEL, "model.1.pt": MODEL} | {f"rank_{rank}.pt": REST for rank in range(4)},
        ),
    ],
    ids=told,
)
def test_the_table_of_fairseq2(size: Size, replicated: Collection[str], files: dict[str, set[str]]) -> None:
    """It is what the rules below say; they are then tried for every size and case."""
    assert expected_files(size, replicated) == files


@pytest.mark.parametrize("replicated", CASES, ids=lambda case: "+".join(sorted(case)) if case else "none")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_files_keys_and_what_comes_back(tmp_path: Path, size: Size, replicated: set[str] | None) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> tuple[dict[str, Any], dict[str, Any]]:
        saved = state_of(gangs, replicated or ())
        transact(manager, 1000, saved, replicated_keys=replicated)
        return saved, manager.load_checkpoint(1000)

    outcomes = on_ranks(size, tmp_path, act)
    expected = expected_files(size, replicated or ())
    assert files_in(tmp_path) == {f"step_1000/{name}" for name in (*expected, "manifest.json")}
    archives = opened(tmp_path / "step_1000")
    assert {name: set(content) for name, content in archives.items()} == expected
    for saved, loaded in outcomes:
        equal(loaded, saved)
    for rank, (saved, _) in enumerate(outcomes):  # each file by itself holds the values, too
        for name in (f"rank_{rank}.pt", *(name for name in archives if _is_of(name, rank % size.tp, size))):
            for key in set(archives.get(name, ())) - {"model_key"}:
                equal(archives[name][key], saved[key])


def _is_of(name: str, tp_rank: int, size: Size) -> bool:
    """Whether a file is one that all data-parallel ranks of a shard hold alike."""
    return name.startswith(("model", "replicated")) and (size.tp == 1 or name.split(".")[1] == str(tp_rank))


@pytest.mark.parametrize("replicated", [None, {"net"}, {"*"}], ids=str)
@pytest.mark.parametrize("size", [Size(1), Size(2), Size(2, 2)], ids=str)
def test_a_model_of_another_name(tmp_path: Path, size: Size, replicated: set[str] | None) -> None:
    """Every file that holds the model says, under "model_key", what it is called."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        saved = state_of(gangs, replicated or (), model_key="net")
        transact(manager, 1, saved, model_key="net", replicated_keys=replicated)
        equal(manager.load_checkpoint(1), saved)

    on_ranks(size, tmp_path, act)
    archives = opened(tmp_path / "step_1")
    assert {name: set(content) for name, content in archives.items()} == expected_files(size, replicated or (), "net")
    assert {content["model_key"] for content in archives.values() if "net" in content} == {"net"}


@pytest.mark.parametrize("place", [MemoryStorage, MemoryObjects])
def test_other_places_than_a_local_folder(place: type) -> None:
    """A file system in memory, and an object store that cannot rename."""
    storage = place()
    storage.put("cc/deep/notes.txt", [b"kept"])

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for step in (1, 2, 1):  # the last one replaces a step
            saved = state_of(gangs, {"model", "epoch"}, base=step)
            manager.begin_checkpoint(step)
            manager.save_state(saved, replicated_keys={"model", "epoch"})
            manager.save_metadata({"of": step})
            manager.save_score(0.25 * step, lower_better=True)
            manager.commit_checkpoint()
            equal(manager.load_checkpoint(step), saved)
        assert manager.load_metadata(1) == {"of": 1}
        step, loaded = manager.load_last_checkpoint()
        assert step == 2
        equal(loaded, state_of(gangs, {"model", "epoch"}, base=2))
        manager.keep_best_n_checkpoints(1)
        assert manager.get_step_numbers() == [1, 2]
        manager.delete_checkpoint(2)
        assert manager.get_step_numbers() == [1]

    on_ranks(Size(2, 2), storage, act)


def test_a_url_of_fsspec() -> None:
    state = {"model": {"w": torch.ones(3)}, "epoch": 5}
    with sc.CheckpointManager("memory://runs/one", sc.Gangs.local()) as manager:
        transact(manager, 1, state)
        equal(manager.load_last_checkpoint(), (1, state))


@pytest.mark.parametrize(
    ("score", "lower_better", "content"),
    [
        (0.3, False, "0.3\n"),
        (0.3, True, "-0.3\n"),
        (-0.3, False, "-0.3\n"),
        (-0.3, True, "0.3\n"),
        (7, True, "-7.0\n"),
        (1e-30, False, "1e-30\n"),
        (float("-inf"), True, "inf\n"),
        (torch.tensor(0.5), True, "-0.5\n"),
        (None, False, None),
        (None, True, None),
    ],
    ids=str,
)
def test_a_score_is_a_number_of_which_more_is_better(
    tmp_path: Path, score: float | None, lower_better: bool, content: str | None
) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        manager.save_state(state_of(gangs))
        manager.save_score(score, lower_better=lower_better)
        manager.commit_checkpoint()

    on_ranks(Size(2), tmp_path, act)
    file = tmp_path / "step_1" / "score.txt"
    assert (file.read_text() if file.exists() else None) == content


def test_a_score_may_come_before_the_state_and_does_not_outlive_it(tmp_path: Path) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        manager.save_score(1.0)
        manager.save_score(2.0)
        manager.save_state(state_of(gangs))
        assert not list(tmp_path.glob("**/score.txt"))
        manager.commit_checkpoint()
        assert (tmp_path / "step_1" / "score.txt").read_text() == "2.0\n"
        transact(manager, 1, state_of(gangs))
        assert not (tmp_path / "step_1" / "score.txt").exists()

    on_ranks(Size(1), tmp_path, act)


@pytest.mark.parametrize("size", [Size(1), Size(2), Size(2, 2)], ids=str)
def test_metadata_is_that_of_the_first_data_parallel_rank(tmp_path: Path, size: Size) -> None:
    def metadata(rank: int) -> dict[str, Any]:
        return {"rank": rank, "lengths": [1, (2, 3)], "nested": {"ids": torch.arange(5), "none": None}}

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> tuple[Any, Any]:
        manager.begin_checkpoint(1)
        manager.save_metadata(metadata(gangs.root.rank))
        manager.save_state(state_of(gangs))
        manager.commit_checkpoint()
        transact(manager, 2, state_of(gangs))
        return manager.load_metadata(1), manager.load_metadata(2)

    outcomes = on_ranks(size, tmp_path, act)
    for rank, (loaded, none) in enumerate(outcomes):
        equal(loaded, metadata(rank % size.tp))
        assert none is None
    names = {"metadata.pt"} if size.tp == 1 else {"metadata.0.pt", "metadata.1.pt"}
    archives = opened(tmp_path / "step_1")
    assert {name for name in archives if name.startswith("metadata")} == names
    for name in names:
        equal(archives[name], metadata(int(name.split(".")[1]) if size.tp > 1 else 0))


@pytest.mark.parametrize("size", [Size(1), Size(2)], ids=str)
def test_no_metadata(tmp_path: Path, size: Size) -> None:
    """`None` stores none, on all ranks or on those whose metadata would not be taken."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> list[Any]:
        for step, given in ((1, None), (2, {"of": "rank 0"} if gangs.root.rank == 0 else None)):
            manager.begin_checkpoint(step)
            manager.save_state(state_of(gangs))
            manager.save_metadata(given)
            manager.commit_checkpoint()
        return [manager.load_metadata(1), manager.load_metadata(2)]

    assert on_ranks(size, tmp_path, act) == [[None, {"of": "rank 0"}]] * size.ranks
    assert "metadata.pt" not in files_in(tmp_path / "step_1")


CARRIED = {
    "config.json": b'{"hidden": 8}',
    "tokenizer/vocab.txt": b"a\nb\n",
    "tokenizer/deep/er/bytes.bin": bytes(70_000),
}


def test_copies_of_cc_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    for name, content in CARRIED.items():
        (tmp_path / "cc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cc" / name).write_bytes(content)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, state_of(gangs))
        if gangs.root.rank == 0:
            (tmp_path / "cc" / "config.json").write_bytes(b"another one")
        manager.save(2, state_of(gangs)).result()
        equal(manager.load_checkpoint(1), state_of(gangs))

    on_ranks(Size(2), tmp_path, act)
    for step, config in ((1, CARRIED["config.json"]), (2, b"another one")):
        expected = {**CARRIED, "config.json": config}
        folder = tmp_path / f"step_{step}"
        assert files_in(folder) == {*expected, "rank_0.pt", "rank_1.pt", "manifest.json"}
        assert {name: (folder / name).read_bytes() for name in expected} == expected
        record = decode_manifest((folder / "manifest.json").read_bytes())
        listed = {file.name: (file.nbytes, file.crc) for file in record.files if file.kind == "cc"}
        assert listed == {name: (len(content), zlib.crc32(content)) for name, content in expected.items()}


@pytest.mark.parametrize("name", ["manifest.json", "score.txt", "rank_0.pt", "model.pt", "replicated.1.pt"])
def test_a_file_in_cc_that_is_called_like_one_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "cc").mkdir()
    (tmp_path / "cc" / name).write_bytes(b"mine")

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        manager.save_state(state_of(gangs))
        with pytest.raises(sc.CheckpointSaveError, match=f"cc/{name} has a name that each checkpoint uses") as caught:
            manager.commit_checkpoint()
        assert caught.value.step == 1

    on_ranks(Size(2), tmp_path, act)
    assert files_in(tmp_path) == {f"cc/{name}"}


@pytest.mark.parametrize("size", [Size(2), Size(1, 2)], ids=str)
def test_the_model_card(tmp_path: Path, size: Size) -> None:
    config = {"model_dim": 64, "names": ["a", "ü"], "dropout": 0.5, "nested": {"tied": True, "none": None}}

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.save_model_metadata("llama", config, tokenizer="words")
        with pytest.raises(sc.InvalidStateError, match=r"config\.dtype is a torch"):
            manager.save_model_metadata("llama", {"dtype": torch.float32})
        transact(manager, 1, state_of(gangs))

    on_ranks(size, tmp_path, act)
    expected = {
        "name": "checkpoint",
        "model_family": "llama",
        "model_config": {"_set_": config},
        "tokenizer_ref": "words",
        **({"num_shards": 2} if size.tp == 2 else {}),
    }
    assert yaml.safe_load((tmp_path / "model.yaml").read_text()) == expected
    assert "model.yaml" not in files_in(tmp_path / "step_1")


def test_the_record_says_what_is_where(tmp_path: Path) -> None:
    """For people and other programs: plain JSON, every file with its size and checksum."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, state_of(gangs, {"model"}), replicated_keys={"model"})

    on_ranks(Size(2, 2), tmp_path, act)
    folder = tmp_path / "step_1"
    record = json.loads((folder / "manifest.json").read_text())
    assert record["step"] == 1
    for file in decode_manifest((folder / "manifest.json").read_bytes()).files:
        content = (folder / file.name).read_bytes()
        assert (file.nbytes, file.crc) == (len(content), zlib.crc32(content))
