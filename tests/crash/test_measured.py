"""Scores and metrics when a job dies: what was given before the commit is there with it, what was acknowledged stays,
and no step has those of another version of it, or a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.engine.pending import PendingSave
from shardckpt.run.catalog import Catalog
from shardckpt.run.keeping.metrics import read_metrics
from shardckpt.run.scores import read_scores
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.crash.judge import Finding, in_memory, judge
from shardckpt.testing.crash.recorder import Recorder
from shardckpt.testing.crash.requests import RecordedObjects, left
from shardckpt.testing.crash.states import MINIMAL, ORDERED, Model, states
from shardckpt.testing.faults import GatedStorage, on
from tests.crash.acts import ROOT, Act, Hand, work
from tests.crash.ours import make_state
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600)]

Numbers = tuple[float | None, tuple[tuple[str, float], ...]]
"""A step's score, and its metrics by name."""


class NumbersReader:
    """A `Reader` for which a version is what the step has of numbers."""

    def steps(self, storage: Storage) -> list[int]:
        return Catalog(storage).steps()

    def version(self, storage: Storage, step: int) -> Numbers:
        entries = [Catalog(storage).entry(step)]
        scores, metrics = read_scores(storage, entries), read_metrics(storage, entries)[step]
        if scores.damaged or metrics is None:
            raise ValueError("half of a file")
        return scores.by_step.get(step), tuple(sorted(metrics.items()))


def measured(hand: Hand) -> None:
    """Steps get numbers while they are being saved, afterwards, as they are saved again, and by `begin_checkpoint`."""
    place: Any = hand.storage

    def save(step: int, score: float | None, **metrics: float) -> None:
        place.gate.clear()
        place.reached.clear()
        hand.watch.begun(step, numbers := (score, tuple(sorted(metrics.items()))))
        pending = hand.manager.save(step, make_state(0, step))
        assert place.reached.wait(60)
        hand.manager.save_score(score, step=step)
        for name, value in metrics.items():
            hand.manager.save_metrics({name: value}, step=step)
        place.open_gate()
        pending.result()
        hand.watch.acknowledged(step, numbers)

    def give(numbers: Numbers, act: Callable[[], None]) -> None:
        hand.watch.begun(1, numbers)
        act()
        hand.watch.acknowledged(1, numbers)

    save(1, 0.5, loss=1.0, accuracy=0.25)
    one, two = (("accuracy", 0.25), ("loss", 1.0)), (("accuracy", 0.75), ("loss", 1.0))
    give((-2.0, one), lambda: hand.manager.save_score(-2.0, step=1))
    give((-2.0, two), lambda: hand.manager.save_metrics({"accuracy": 0.75}, step=1))
    save(1, None, loss=0.5)
    hand.watch.begun(2, (2.0, ()))
    hand.manager.begin_checkpoint(2)
    hand.manager.save_state(make_state(0, 2))
    hand.manager.save_score(2.0)
    hand.manager.commit_checkpoint()
    hand.watch.acknowledged(2, (2.0, ()))


def on_files(folder: Path, model: Model, count: int) -> tuple[int, list[Finding]]:
    """How many states of a power cut were looked at, and what is wrong in them."""
    recorder = Recorder(str(folder))
    with recorder.watching():
        work(Act(measured), 1, lambda: GatedStorage(LocalStorage(folder / ROOT), on(key=".pt")), recorder)
    found, tried = list[Finding](), 0
    for state in states(recorder.recording, model, count=count, seed=1):
        found += judge(in_memory(state.files, state.folders, below=ROOT), state.allowed, NumbersReader())
        tried += 1
    return tried, found


def on_objects(count: int) -> tuple[int, list[Finding]]:
    """The same between requests; what was not answered comes late, or never."""
    place = RecordedObjects()
    work(Act(measured), 1, lambda: GatedStorage(place, on(key=".pt")), place)
    found, tried = list[Finding](), 0
    for each in left(place.events, count=count, seed=1):
        tried += 1
        storage = each.storage()
        found += judge(storage, each.allowed, NumbersReader())
        for request in each.late:
            request.carry_out(storage)
        found += judge(storage, each.allowed, NumbersReader())
    return tried, found


@pytest.mark.parametrize("model", [ORDERED, MINIMAL], ids=lambda model: model.name)
def test_numbers_after_a_power_cut(tmp_path: Path, model: Model, scale: Scale, scorecard: Scorecard) -> None:
    tried, found = on_files(tmp_path, model, scale.runs(sample=150, full=5000))
    scorecard.add("crash states, scores and metrics", runs=tried, lost=len(found), notes=model.name)
    assert found == []
    assert tried > 100


def test_numbers_after_any_request(scale: Scale, scorecard: Scorecard) -> None:
    tried, found = on_objects(scale.runs(sample=100, full=2000))
    scorecard.add("crash states, scores and metrics", runs=tried, lost=len(found), notes="objects")
    assert found == []
    assert tried > 50


def test_numbers_that_come_after_the_commit_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they did before: what a job had been given was lost if it died at the wrong moment."""
    monkeypatch.setattr(PendingSave, "place", lambda self: {})
    assert {finding.kind for finding in on_files(tmp_path, ORDERED, 150)[1]} == {"lost"}
    assert on_objects(100)[1]
