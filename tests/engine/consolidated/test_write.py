"""The phases on every kind of storage: one rank fails in any of them, all raise, nothing is left, the next works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.engine.consolidated.holding import holding_of
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects
from shardckpt.testing.faults import CountingStorage, FailingStorage, GatedStorage, RecordingStorage, TornStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.engine.consolidated.stages import (
    FOLDER,
    PATIENT,
    PLACES,
    RANKS,
    Stage,
    is_whole,
    load,
    make_place,
    on_all,
    write_on,
)


@pytest.mark.parametrize("kind", PLACES)
def test_all_parts_come_together(tmp_path: Path, kind: str) -> None:
    place = make_place(kind, tmp_path)
    entries = run_ranks(RANKS, lambda gangs: write_on(gangs, place, Stage(gangs.root.rank)))
    assert [entry is None for entry in entries] == [False, True, True]
    assert entries[0] is not None
    assert entries[0].nbytes == place.size(f"{FOLDER}/model.pt")
    assert is_whole(place)
    found = load(place)
    assert found["layers.2.tied"].data_ptr() == found["layers.2.weight"].data_ptr()
    assert list(found)[:3] == ["shared", "layers.0.weight", "layers.0.turned"]


@dataclass(frozen=True)
class Row:
    """Which operation of which rank goes wrong."""

    rank: int
    operation: str
    key: str
    nth: int = 1
    after: bool = False


ROWS = [
    Row(1, "put", "part_1"),
    Row(2, "put", "part_2"),
    Row(2, "put", "part_2", after=True),
    Row(0, "put", "model.pt"),
    Row(0, "put", "model.pt", after=True),
    Row(0, "read_into", "part_1"),
    Row(0, "read_into", "part_2"),
    Row(0, "read_into", "", nth=4),
    Row(0, "delete", "part_1"),
    Row(0, "delete", "part_1", after=True),
]


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_operation_fails(tmp_path: Path, kind: str, row: Row) -> None:
    place = make_place(kind, tmp_path)
    views = [place] * RANKS
    failing = FailingStorage(place, on(row.operation, key=row.key), nth=row.nth, after=row.after)
    views[row.rank] = failing
    outcomes = on_all(lambda gangs: attempt_twice(gangs, views, place))
    assert failing.failed == 1
    check_outcomes(outcomes, rf"rank {row.rank}: ConnectionResetError: injected")
    assert is_whole(place)


def attempt_twice(gangs: sc.Gangs, views: list[Storage], place: Storage) -> tuple[BaseException | None, list[str]]:
    """What the first attempt raised, and what it left; the second must succeed, and does so on `place` itself."""
    rank = gangs.root.rank
    error: BaseException | None = None
    try:
        write_on(gangs, views[rank], Stage(rank), scope="first")
    except sc.CheckpointError as raised:
        error = raised
    gangs.root.enter("between", timeout=PATIENT)
    left = place.list(FOLDER)
    gangs.root.enter("again", timeout=PATIENT)
    write_on(gangs, place, Stage(rank), scope="second")
    return error, left


def check_outcomes(outcomes: list[Any], said: str) -> None:
    """On all ranks the same error, and nothing left."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise AssertionError from outcome
        error, left = outcome
        assert isinstance(error, sc.GangError)
        assert error.step == 7
        assert re.search(said, str(error)), error
        assert not left
    assert len({str(error).partition("\n")[0] for error, _ in outcomes}) == 1


class NoState(nn.Module):
    def get_extra_state(self) -> Any:
        raise RuntimeError("no state today")


def spoil_by_error(model: nn.Module) -> None:
    model.add_module("broken", NoState())


def spoil_by_meta(model: nn.Module) -> None:
    model.register_buffer("nowhere", torch.empty(3, device="meta"))


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(spoil_by_error, "RuntimeError: no state today"), (spoil_by_meta, "InvalidStateError: model.nowhere cannot be")],
)
def test_one_model_cannot_be_taken(rank: int, spoil: Callable[[nn.Module], None], said: str) -> None:
    place = MemoryObjects()

    def act(gangs: sc.Gangs) -> tuple[BaseException, list[str]]:
        model = Stage(gangs.root.rank)
        if gangs.root.rank == rank:
            spoil(model)
        with pytest.raises(sc.GangError) as caught:
            write_on(gangs, place, model)
        return caught.value, place.list(FOLDER)

    check_outcomes(on_all(act), f"rank {rank}: {said}")


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_storage_that_hangs_holds_nobody(rank: int) -> None:
    place = MemoryObjects()
    gated = GatedStorage(place, on("put"))

    def act(gangs: sc.Gangs) -> BaseException:
        mine = gangs.root.rank == rank
        with pytest.raises(sc.GangError) as caught:
            write_on(gangs, gated if mine else place, Stage(gangs.root.rank), timeout=timedelta(seconds=2))
        return caught.value

    try:
        outcomes = on_all(act)
    finally:
        gated.open_gate()
    for error in outcomes:
        assert isinstance(error, sc.GangError), error
        assert "longer than 2 s" in str(error) or f"rank {rank} did not answer" in str(error) or rank == 0


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("where", [0, 1_000_003, -1])
def test_a_flipped_byte_in_a_part_is_found(tmp_path: Path, kind: str, where: int) -> None:
    """In the first and the last byte of a tensor, and in what the rank notes of its state, which is last."""
    place = make_place(kind, tmp_path)
    torn = TornStorage(place)
    holding = holding_of(Stage(1), "model")
    nbytes = sum(fragment.nbytes for fragment in holding.fragments) + len(holding.notes)
    torn.tear(f"{FOLDER}/model.pt.part_1", flip=where % nbytes)
    outcomes = on_all(lambda gangs: attempt_twice(gangs, [torn] * RANKS, place))
    check_outcomes(outcomes, "rank 0: CheckpointDamagedError: .*part_1")


@pytest.mark.parametrize("keep", [0, 100_000])
def test_a_part_that_is_cut_off_is_found(tmp_path: Path, keep: int) -> None:
    place = make_place("local", tmp_path)
    torn = TornStorage(place)
    torn.tear(f"{FOLDER}/model.pt.part_2", keep=keep)
    outcomes = on_all(lambda gangs: attempt_twice(gangs, [torn] * RANKS, place))
    check_outcomes(outcomes, "rank 0: EOFError: .*part_2")


def test_every_part_is_read_once_and_rank_0_writes_none() -> None:
    place = RecordingStorage(CountingStorage(MemoryObjects()))
    run_ranks(RANKS, lambda gangs: write_on(gangs, place, Stage(gangs.root.rank)))
    put = sorted(operation.key for operation in place.operations if operation.name == "put")
    assert put == [f"{FOLDER}/model.pt", *(f"{FOLDER}/model.pt.part_{rank}" for rank in range(1, RANKS))]
    counted = place.inner
    for rank in range(1, RANKS):
        holding = holding_of(Stage(rank), "model")
        unread = 11 * 4  # the buffer that all stages have, which is taken from the first
        nbytes = sum(fragment.nbytes for fragment in holding.fragments) + len(holding.notes) - unread
        assert counted.nbytes[f"{FOLDER}/model.pt.part_{rank}"] == nbytes


@pytest.mark.parametrize("copies", [1, 3])
def test_who_holds_all_of_it_needs_no_parts(copies: int) -> None:
    """One process, or data-parallel copies: the live tensors go straight into the file, and once."""
    place = RecordingStorage(MemoryObjects())
    run_ranks(copies, lambda gangs: write_on(gangs, place, Stage(1)))
    assert sum(operation.name == "put" for operation in place.operations) == 1
    assert all(not operation.keys for operation in place.operations if operation.name == "read_into")
    assert load(place).keys() == Stage(1).state_dict().keys()


class Talkative(nn.Linear):
    """With extra state: values and tensors, nested."""

    def __init__(self, said: Any) -> None:
        super().__init__(2, 2)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.said = said

    def get_extra_state(self) -> Any:
        return self.said


def test_extra_state_is_kept_nested(caplog: pytest.LogCaptureFixture) -> None:
    place = MemoryObjects()
    said = {"scale": torch.arange(3.0), "names": ["a", "b"], "more": [torch.ones(2), {"x": torch.zeros(1)}], "n": None}
    run_ranks(2, lambda gangs: write_on(gangs, place, Talkative({**said, "rank": gangs.root.rank})))
    found = load(place)["_extra_state"]
    assert found["scale"].tolist() == [0.0, 1.0, 2.0]
    first, second = found["more"]
    assert (first.tolist(), second["x"].tolist()) == ([1.0, 1.0], [0.0])
    assert [found[key] for key in ("names", "n", "rank")] == [["a", "b"], None, 0]
    assert "model._extra_state.rank differs between ranks" in caplog.text


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    place = MemoryObjects()
    run_ranks(RANKS, lambda gangs: write_on(gangs, place, Stage(gangs.root.rank).cuda()))
    assert is_whole(place)


def test_a_model_without_anything() -> None:
    place = MemoryObjects()
    run_ranks(2, lambda gangs: write_on(gangs, place, nn.Identity()))
    assert load(place) == {}


def test_copies_that_differ_name_the_tensor_and_the_ranks() -> None:
    place = MemoryObjects()

    def act(gangs: sc.Gangs) -> str:
        model = Stage(0)
        with torch.no_grad():
            model.layers["0"].turned[3, 3] += gangs.root.rank == 2
        with pytest.raises(sc.CheckpointSaveError) as caught:
            write_on(gangs, place, model)
        return str(caught.value)

    for error in on_all(act):
        assert re.search(r"different values.*model.layers.0.turned \(for example ranks 0 and 2\)\. Bring", error), error
    assert place.list() == []


def test_stages_that_differ_in_what_they_share() -> None:
    place = MemoryObjects()

    def act(gangs: sc.Gangs) -> tuple[BaseException, list[str]]:
        model = Stage(gangs.root.rank)
        model.shared += gangs.root.rank == 1
        with pytest.raises(sc.GangError) as caught:
            write_on(gangs, place, model)
        gangs.root.enter("between", timeout=PATIENT)
        return caught.value, place.list(FOLDER)

    check_outcomes(on_all(act), "ranks 0 and 1 hold different values of model.shared")
