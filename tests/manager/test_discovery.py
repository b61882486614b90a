"""Which step `resume` takes and why, fresh starts, parts of a state, and when a save is due."""

from __future__ import annotations

import logging
import shutil
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardckpt as sc
from shardckpt.manager.steps.resuming import split_step
from shardckpt.manager.steps.scheduling import Schedule
from shardckpt.manager.talk import Talk
from shardckpt.run.choosing.due import Moment, SaveAny, next_look
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import GatedStorage, flip_byte, on
from shardckpt.testing.gangs import run_ranks

LIMIT = timedelta(seconds=20)


def manager(root: Any, gangs: sc.Gangs | None = None, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, gangs or sc.Gangs.local(), timeout=LIMIT, **options)


def state_at(step: int) -> dict[str, Any]:
    return {"w": torch.full((3,), float(step)), "step": step}


def test_a_save_under_way_is_waited_for() -> None:
    """It was not there yet, and the training began afresh without a word."""
    place = GatedStorage(MemoryStorage("slow"), on("put"))
    with manager(place) as checkpoints:
        checkpoints.save(1, state_at(1))
        assert place.reached.wait(LIMIT.total_seconds())
        opener = threading.Timer(0.2, place.open_gate)
        opener.start()
        resumed = checkpoints.resume(state_at(0))
        opener.join()
    assert resumed is not None
    assert resumed.step == 1


def make(root: Any, scores: dict[int, float | None]) -> None:
    with manager(root) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_at(step))
            checkpoints.save_score(score, step=step)


def taken(root: Any, which: Any, **options: Any) -> tuple[int | None, sc.CheckpointInfo | None]:
    """The step that is in the state after `resume`, and what it said."""
    state = state_at(0)
    keep = options.pop("keep", None)
    with manager(root, keep=keep) as checkpoints:
        info = checkpoints.resume(state, which, **options)
    assert info is None or info.step == state["step"] == state["w"][0]
    return state["step"] or None, info


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"


def test_each_way_to_say_which(root: str, caplog: pytest.LogCaptureFixture) -> None:
    assert taken(root, True) == (None, None)
    assert taken(root, "best") == (None, None)
    make(root, {10: 0.5, 20: 0.9, 30: 0.1, 40: None})
    caplog.set_level(logging.INFO)
    for which, step, reason in (
        (True, 40, "the newest"),
        ("latest", 40, "the newest"),
        ("best", 20, "the best by score"),
        (10, 10, "asked for by its number"),
        (root, 40, "the newest of the run that was asked for"),
        (f"{root}/step_30", 30, "asked for by its place"),
    ):
        got, info = taken(root, which)
        assert got == step
        assert info is not None
        assert info.reason == reason
        assert f"resumed from step {step} in {info.url}: {reason}" in caplog.text
    assert taken(root, "best", keep=sc.KeepBest(1, lower_better=True))[0] == 30
    for missing in (50, f"{root}/step_50", f"{root}_not"):
        with pytest.raises(sc.CheckpointNotFoundError):
            taken(root, missing)


def test_the_best_that_is_damaged_gives_way_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, {10: 0.5, 20: 0.9, 30: 0.1})
    flip_byte(next((tmp_path / "step_20").glob("*.pt")), -40)
    caplog.set_level(logging.INFO)
    got, info = taken(tmp_path, "best")
    assert got == 10
    assert info is not None
    assert [step for step, _ in info.skipped] == [20]
    assert info.reason == "the best by score of the good ones, 1 passed over"
    assert "step 20 is passed over" in caplog.text


def test_steps_without_a_score_are_not_the_best(tmp_path: Path) -> None:
    make(tmp_path, {10: None, 20: None})
    with pytest.raises(sc.CheckpointNotFoundError, match=r"none of the 2 steps .* 'score'"):
        taken(tmp_path, "best")


def test_a_step_asked_for_by_number_is_not_replaced_by_another(tmp_path: Path) -> None:
    make(tmp_path, {10: None, 20: None})
    flip_byte(next((tmp_path / "step_20").glob("*.pt")), -40)
    with pytest.raises(sc.CheckpointDamagedError):
        taken(tmp_path, 20)


def test_a_run_that_was_moved_still_loads(tmp_path: Path) -> None:
    make(tmp_path / "old", {10: 0.5})
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert taken(tmp_path / "new", True)[0] == 10
    assert taken(tmp_path / "third", tmp_path / "new")[0] == 10
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("where", "root", "step"),
    [
        ("a/b/step_3/", "a/b", 3),
        ("step_3", ".", 3),
        ("/step_3", "/", 3),
        ("s3://b/r/step_12", "s3://b/r", 12),
        ("a/step_x", "a/step_x", None),
    ],
)
def test_places_of_steps(where: str, root: str, step: int | None) -> None:
    assert split_step(where) == (root, step)


def test_a_fresh_start_where_there_are_steps(tmp_path: Path) -> None:
    assert taken(tmp_path, False) == (None, None)
    make(tmp_path, {10: 0.5, 20: None})
    with pytest.raises(sc.InvalidOperationError, match="has 2 steps, the last of them 20"):
        taken(tmp_path, False)
    assert taken(tmp_path, False, overwrite="go on") == (None, None)
    assert taken(tmp_path, True)[0] == 20
    with manager(tmp_path) as checkpoints:
        checkpoints.pin(10)
    assert taken(tmp_path, False, overwrite="set aside") == (None, None)
    assert taken(tmp_path, True) == (None, None)
    (earlier,) = tmp_path.iterdir()
    assert taken(earlier, "best")[0] == 10
    with manager(earlier) as checkpoints:
        assert checkpoints.pinned() == [10]
    make(tmp_path, {5: None})
    assert taken(tmp_path, True)[0] == 5


def test_object_stores_set_nothing_aside() -> None:
    from shardckpt.storage.memory import MemoryObjects

    place = MemoryObjects()
    make(place, {10: None})
    with pytest.raises(sc.CheckpointSaveError, match="take another root"):
        taken(place, False, overwrite="set aside")
    assert taken(place, True)[0] == 10


def training() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"net": model, "opt": optimizer, "rng": sc.RngState(), "loader": {"at": 5}, "epoch": 3, "mine": 7}


def test_parts_are_known_by_what_they_are_or_by_name() -> None:
    state = training()
    assert set(sc.Parts().of(state)) == set(state)
    assert set(sc.Parts(model=False, rng=False).of(state)) == {"opt", "loader", "epoch", "mine"}
    assert set(sc.Parts.only("model").of(state)) == {"net", "mine"}
    assert len(sc.Parts(optimizer=False).of(state)) == 5
    with pytest.raises(KeyError):
        sc.Parts(optimizer=False).of(state)["opt"]
    with pytest.raises(ValueError, match="give one or more of model, optimizer"):
        sc.Parts.only("modle")


def test_parts_that_are_left_out_are_neither_saved_nor_restored(tmp_path: Path) -> None:
    state = training()
    with manager(tmp_path) as checkpoints:
        checkpoints.save(1, sc.Parts(data=False).of(state), model_key="net").result()
    found = training()
    found["epoch"] = 0
    with torch.no_grad():
        found["net"].weight.zero_()
    with manager(tmp_path) as checkpoints:
        with pytest.raises(sc.CheckpointMismatchError, match="loader"):
            checkpoints.resume(dict(found))
        assert checkpoints.resume(sc.Parts(data=False, model=False).of(found)) is not None
        assert found["epoch"] == 3, "what is loaded into the view is in the state"
        assert not found["net"].weight.any()
        assert checkpoints.resume(sc.Parts(data=False).of(found)) is not None
    assert torch.equal(found["net"].weight, state["net"].weight)


@pytest.mark.parametrize("missing", ["error", "keep"])
def test_a_step_of_the_model_alone_is_not_chosen_unasked(tmp_path: Path, missing: Any) -> None:
    state = {"model": nn.Linear(2, 2), "epoch": 3}
    with manager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        checkpoints.save(2, sc.Parts.only("model").of(state)).result()
        policy = sc.LoadPolicy(missing=missing)
        info = checkpoints.resume(dict(state), policy=policy)
        assert info is not None
        assert (info.step, [step for step, _ in info.skipped]) == (1, [2])
        assert checkpoints.resume({"model": nn.Linear(2, 2)}) is not None
        if missing == "keep":
            assert checkpoints.resume(dict(state), 2, policy=policy) is not None
        else:
            with pytest.raises(sc.CheckpointMismatchError, match="only the model is there"):
                checkpoints.resume(dict(state), 2)


def due_at(rule: sc.SaveRule, steps: range, *, start: int = 0, per_epoch: int = 1000) -> list[int]:
    with manager("memory://nothing") as checkpoints:
        schedule = checkpoints.schedule(rule, step=start)
        return [step for step in steps if schedule.due(step, epoch=step // per_epoch)]


def test_steps_and_epochs() -> None:
    assert due_at(sc.SaveEvery(steps=10), range(1, 31)) == [10, 20, 30]
    assert due_at(sc.SaveEvery(steps=10), range(16, 31), start=15) == [20, 30]
    assert due_at(sc.SaveEvery(steps=10), range(3, 31, 3)) == [12, 21, 30]
    assert due_at(sc.SaveEvery(epochs=2), range(1, 31), per_epoch=5) == [10, 20, 30]
    both = sc.SaveEvery(steps=10) | sc.SaveEvery(epochs=1)
    assert isinstance(both, SaveAny)
    assert due_at(both, range(1, 21), per_epoch=7) == [7, 10, 14, 20]
    for wrong in ({}, {"steps": 0}, {"seconds": -1.0}):
        with pytest.raises(ValueError, match="more than 0"):
            sc.SaveEvery(**wrong)  # type: ignore[arg-type]


class Early(sc.SaveRule):
    def due(self, now: Moment, last: Moment) -> str:
        return "powers of two" if now.step & (now.step - 1) == 0 else ""


def test_a_rule_of_ones_own() -> None:
    assert due_at(Early() | sc.SaveEvery(steps=10), range(1, 21)) == [1, 2, 4, 8, 10, 16, 20]


class Ticking:
    """A clock that goes on by a second at each step of a rank."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_are_those_of_rank_0_on_all_ranks_and_few_looks_are_needed() -> None:
    def job(gangs: sc.Gangs) -> tuple[list[int], int]:
        clock, talk = Ticking(), Talk(gangs.fork("load").root, timeout=LIMIT)
        schedule = Schedule(sc.SaveEvery(seconds=100), Moment(0), talk=talk, clock=clock)
        due, pace = [], 1.0 if gangs.root.rank == 0 else 50.0
        for step in range(1, 301):
            clock.now += pace
            if schedule.due(step):
                due.append(step)
        looks = sum(talk._tries.values())
        talk.close()
        return due, looks

    answers = run_ranks(2, job)
    assert answers[0] == answers[1]
    due, looks = answers[0]
    assert due == [100, 200, 300]
    assert looks <= 35


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 500), st.floats(0.01, 1000), st.floats(0, 2000), st.integers(0, 10**6))
def test_the_next_look_is_later_and_not_too_late(rate: float, interval: float, elapsed: float, step: int) -> None:
    look = next_look(Moment(step, 0, elapsed), interval_s=interval, rate_s=rate)
    assert look > step
    assert look == step + 1 or elapsed + (look - step) * rate <= interval


def test_all_ranks_take_the_same_step(tmp_path: Path) -> None:
    def job(gangs: sc.Gangs) -> list[int]:
        with manager(tmp_path, gangs) as checkpoints:
            state = state_at(0)
            for step, score in ((10, 0.9), (20, 0.1)):
                checkpoints.save(step, state_at(step), replicated="*")
                checkpoints.save_score(score, step=step)
                checkpoints.wait()
            found = [checkpoints.resume(state, which) for which in (True, "best", 10, str(tmp_path / "step_20"))]
            with pytest.raises(sc.InvalidOperationError):
                checkpoints.resume(state, False)
        return [info.step for info in found if info]

    assert run_ranks(2, job) == [[20, 10, 10, 20]] * 2
