"""Pins, metrics, times and dry runs: what keeps a step beside its number and score."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.run.keeping.metrics import metrics_key, plain_metrics, read_metrics, write_metrics
from shardckpt.run.keeping.pins import pin, pinned_steps, unpin
from shardckpt.run.prune import plan_retention, retain
from shardckpt.run.retention import StepFacts
from shardckpt.storage.base import Storage
from shardckpt.testing.faults import RecordingStorage
from shardckpt.testing.gangs import run_ranks
from shardckpt.tools.verify import verify
from tests.run.making import commit

LIMIT = timedelta(seconds=20)


def manager(root: Any, gangs: sc.Gangs | None = None, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, gangs or sc.Gangs.local(), timeout=LIMIT, **options)


def gone(deleted: Any) -> list[int]:
    return [one.step for one in deleted]


def test_pinned_steps_stay_until_they_are_unpinned(storage: Storage) -> None:
    for step in (1, 2, 3, 4):
        commit(storage, step)
    catalog = Catalog(storage)
    assert pinned_steps(storage) == frozenset()
    pin(catalog, 2)
    pin(catalog, 2)
    with pytest.raises(sc.CheckpointNotFoundError):
        pin(catalog, 9)
    storage.put("pins/notes.txt", [b"not a pin"])
    assert pinned_steps(storage) == {2}
    assert plan_retention(catalog, sc.KeepLast(1)).kept == {
        2: "pinned",
        4: "the last committed step; one of the last 1",
    }
    assert gone(retain(catalog, sc.KeepLast(1))) == [1, 3]
    unpin(storage, 2)
    unpin(storage, 2)
    assert gone(retain(catalog, sc.KeepLast(1))) == [2]


def test_metrics_are_joined_and_the_best_by_one_of_them_stays(storage: Storage) -> None:
    catalog = Catalog(storage)
    for step, loss in ((1, 0.5), (2, 0.1), (3, float("inf")), (4, None), (5, 0.9)):
        commit(storage, step)
        if loss is not None:
            write_metrics(storage, catalog.entry(step), metrics={"loss": loss})
    write_metrics(storage, catalog.entry(1), metrics={"accuracy": 0.8})
    entries = catalog.entries()
    assert read_metrics(storage, entries) == {
        1: {"loss": 0.5, "accuracy": 0.8}, 2: {"loss": 0.1}, 3: {"loss": float("inf")}, 4: {}, 5: {"loss": 0.9},
    }  # fmt: skip
    policy = sc.KeepBest(1, lower_better=True, metric="loss") | sc.KeepBest(1, metric="accuracy")
    assert plan_retention(catalog, policy).kept == {
        1: "number 1 of the best by accuracy: 0.8",
        2: "number 1 of the best by loss: 0.1",
        5: "the last committed step",
    }
    assert gone(retain(catalog, policy)) == [3, 4]


def test_a_step_with_damaged_metrics_may_be_the_best_and_stays(storage: Storage) -> None:
    catalog = Catalog(storage)
    for step in (1, 2, 3):
        commit(storage, step)
        write_metrics(storage, catalog.entry(step), metrics={"loss": step})
    storage.replace(metrics_key(catalog.entry(2)), b"[")
    policy = sc.KeepBest(1, lower_better=True, metric="loss")
    assert plan_retention(catalog, policy).kept[2] == "its metrics cannot be read"
    commit(storage, 4)
    assert gone(retain(catalog, policy)) == [3]
    assert Catalog(storage).steps() == [1, 2, 4]


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": "much"}, {"score": 1.0}])
def test_what_is_no_metric(bad: Any) -> None:
    with pytest.raises(sc.InvalidStateError):
        plain_metrics(bad)
    assert plain_metrics({"loss": torch.tensor(0.5)}) == {"loss": 0.5}


def at(minute: int, step: int) -> StepFacts:
    return StepFacts(step, f"2026-01-01T{minute // 60:02}:{minute % 60:02}:00Z")


def test_the_first_step_of_each_stretch_of_time_stays() -> None:
    history = [at(0, 1), at(5, 2), at(59, 3), at(60, 4), at(61, 5), at(200, 6), StepFacts(7)]
    hourly = sc.KeepEvery(seconds=3600)
    assert sorted(hourly.keep(history)) == [1, 4, 6, 7]
    assert hourly.uses == {"created"}
    assert not sc.KeepEvery(steps=2).uses
    assert str(hourly) == "KeepEvery(seconds=3600)"
    for wrong in ({}, {"steps": 1, "seconds": 1.0}, {"seconds": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            sc.KeepEvery(**wrong)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 600), max_size=8), st.integers(60, 9000))
def test_pruning_by_time_twice_is_pruning_once(minutes: list[int], seconds: int) -> None:
    policy = sc.KeepEvery(seconds=seconds)
    history = [at(minute, step) for step, minute in enumerate(sorted(minutes))]
    kept = policy.keep(history)
    assert set(policy.keep([facts for facts in history if facts.step in kept])) == set(kept)


def test_a_manager_says_why_each_step_stays_or_goes(storage: Storage) -> None:
    with manager(storage, keep=sc.KeepAll()) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, {"w": torch.ones(2)})
            checkpoints.save_metrics({"loss": abs(step - 2)}, step=step)
        checkpoints.wait()
        assert checkpoints.best() is None
        checkpoints.save_score(9.0, step=1)
        checkpoints.save_score(-9.0, step=1, lower_better=True)
        checkpoints.save_metrics({"accuracy": 1}, step=2)
        checkpoints.pin(4)
        assert (checkpoints.best(), checkpoints.pinned()) == (1, [4])
        assert verify(storage).steps[1].notes == ()
    policy = sc.KeepBest(1, lower_better=True, metric="loss")
    with manager(storage, keep=policy) as checkpoints:
        assert checkpoints.best() == 2
        checkpoints.save_score(1.0, step=2, lower_better=True)  # the policy's direction is that of its own metric
        assert checkpoints.resume({"w": torch.ones(2)}, 3) is not None
        told = [(fate.step, fate.kept, fate.reason) for fate in checkpoints.prune(dry_run=True)]
        assert told == [
            (1, False, f"not kept by {policy}"),
            (2, True, "number 1 of the best by loss: 0.0"),
            (3, True, "the step that was resumed from"),
            (4, True, "pinned"),
            (5, True, "the last committed step"),
        ]
        assert checkpoints.steps() == [1, 2, 3, 4, 5]
        assert [fate.step for fate in checkpoints.prune() if not fate.kept] == [1]
        checkpoints.unpin(4)
        last = checkpoints.prune(sc.KeepLast(1))
        assert [(fate.step, fate.kept) for fate in last] == [(2, True), (3, True), (4, False), (5, True)]
        assert last[0].reason == "the best by loss: 0.0"  # as the manager's own policy says
        assert checkpoints.steps() == [2, 3, 5]


def test_a_policy_keeps_models_and_looks_at_each_once(storage: Storage) -> None:
    """In the background after each save; a step that is resumed from stays whole; the rest of the others goes."""
    policy = sc.KeepLast(1) | sc.PreserveModel(sc.KeepEvery(steps=2))
    with manager(storage, keep=policy) as checkpoints:
        for step in (1, 2, 3, 4, 5, 6):
            checkpoints.save(step, {"model": {"w": torch.full((2,), float(step))}, "mine": step})
    recording = RecordingStorage(storage)
    with manager(recording, keep=policy) as checkpoints:
        assert [(fate.step, fate.kept, fate.model_kept, fate.reason) for fate in checkpoints.prune(dry_run=True)] == [
            (2, False, True, "a multiple of 2"),
            (4, False, True, "a multiple of 2"),
            (6, True, False, "the last committed step; one of the last 1"),
        ]
        assert [fate.step for fate in checkpoints.prune()] == [2, 4, 6]
        seen = len(recording.operations)
        assert [fate.step for fate in checkpoints.prune()] == [2, 4, 6]
        read = {key for each in recording.operations[seen:] if each.name == "read" for key in each.keys}
        assert read == {"step_6/manifest.json"}
    catalog = Catalog(storage)
    assert {step: catalog.record(step)[1].model_only for step in catalog.steps()} == {2: True, 4: True, 6: False}
    with manager(storage, keep=policy) as checkpoints:
        model = {"w": torch.zeros(2)}
        checkpoints.load(4, {"model": model})
        assert model["w"].tolist() == [4.0, 4.0]
        checkpoints.save(4, {"model": model, "mine": 4}).result()  # it is whole again, and goes when it is not the last
        assert checkpoints.resume({"model": model, "mine": 0}) is not None
        checkpoints.save(8, {"model": model, "mine": 8}).result()
        checkpoints.wait()
    assert {step: catalog.record(step)[1].model_only for step in catalog.steps()} == {
        2: True,
        4: True,
        6: False,
        8: False,
    }


def test_all_ranks_hear_the_same() -> None:
    from shardckpt.storage.memory import MemoryStorage

    place = MemoryStorage()

    def job(gangs: sc.Gangs) -> Any:
        with manager(place, gangs) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, {"w": torch.ones(2)}, replicated="*").result()
            checkpoints.save_metrics({"loss": 1.0}, step=1)
            checkpoints.pin(1)
            with pytest.raises(sc.CheckpointNotFoundError):
                checkpoints.pin(7)
            return checkpoints.pinned(), checkpoints.best(), checkpoints.prune(sc.KeepLast(1))

    one, other = run_ranks(2, job)
    assert one == other
    assert one[0] == [1]
