"""Saves that share bases, scores, retention, deletions, sweeps and crashes, in any order and in the middle of each
other, against a plain dict of what must be there: what a record names is there, what is to be kept is as it was, and
what no record names goes in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import shardckpt as sc
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import BLOBS, MANIFEST, step_folder
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts, sweep
from shardckpt.run.retention import KeepBest, KeepEvery, KeepLast, PreserveModel
from shardckpt.run.scores import read_scores
from shardckpt.run.shared.references import references
from shardckpt.run.shared.sweeping import sweep_blobs
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.tools.contents import files_below
from tests.faults.test_overwrite import DyingStorage, NoExchange
from tests.run.faulty import WatchedStorage
from tests.run.test_retention_model import Keep, Run, Step, after
from tests.scorecard import Scale, Scorecard

LIMIT = timedelta(seconds=30)
STEPS, BASES = st.integers(0, 5), st.integers(0, 2)
PLACES = st.sampled_from([MemoryStorage, MemoryObjects, NoExchange])
CUTS = st.integers(1, 25)
SCORES = st.sampled_from([-1.0, 0.0, 0.5])


def state_of(base: int, seed: int) -> dict[str, Any]:
    return {"model": {"base": torch.full((50,), float(base)), "head": torch.tensor(float(seed))}, "seed": seed}


def named(place: Storage) -> set[str]:
    catalog = Catalog(place)
    return {file.blob for entry in catalog.entries() for file in catalog.record(entry)[1].files if file.blob}


def blobs(place: Storage) -> set[str]:
    return {f"{BLOBS}/{name}" for name in files_below(place, BLOBS) if name.endswith(".pt")}


class History(RuleBasedStateMachine):
    """`saved` and `run` are what must be there: by step its base and its seed, its score, and whether only its model is
    left."""

    rules_run = reused = reduced = cut_off = 0

    @initialize(kind=PLACES)
    def begin(self, kind: type[Storage]) -> None:
        self.place: Any = kind()
        self.saved: dict[int, tuple[int, int]] = {}
        self.run: Run = {}
        self.seeds = 0
        self.damaged: dict[str, bytes] = {}

    def save(self, storage: Storage, step: int, base: int) -> None:
        """By a job of its own, which may die; what is there then is one or the other."""
        self.seeds += 1
        error: sc.CheckpointError | None = None
        before, manager = blobs(self.place), sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)
        try:
            manager.save(step, state_of(base, self.seeds), frozen=("model.base",)).result(LIMIT)
        except sc.CheckpointError as caught:
            error = caught
        finally:
            manager.close()
        if error is None or self.look(step) == (base, self.seeds):
            self.saved[step], self.run[step] = (base, self.seeds), Step("own")
            type(self).reused += blobs(self.place) == before

    def look(self, step: int) -> tuple[int, int] | None:
        if step not in Catalog(self.place).steps():
            return None
        state = state_of(0, 0)
        with sc.CheckpointManager(self.place, sc.Gangs.local(), timeout=LIMIT) as manager:
            manager.load(step, {"model": state["model"]} if self.is_reduced(step) else state)
        model = state["model"]
        assert state["seed"] in (0, int(model["head"]))
        return int(model["base"][0]), int(model["head"])

    def is_reduced(self, step: int) -> bool:
        return Catalog(self.place).record(step)[1].model_only

    def change(self, left: Run, act: Callable[[sc.CheckpointManager], object], cut: int | None, late: bool) -> None:
        """By a job that may die at its `cut`-th operation: what is to be kept is as it was, the rest whole or gone."""
        dying = None if cut is None else DyingStorage(self.place, nth=cut, done=late)
        storage: Any = dying or self.place
        manager = sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)
        try:
            act(manager)
        except sc.CheckpointError:
            assert dying is not None
            assert dying.died
        finally:
            manager.close()
        if dying is not None and dying.died:
            type(self).cut_off += 1
            there = set(Catalog(self.place).steps())
            assert left.keys() <= there <= self.run.keys()
            found = {step: replace(self.run[step], model_only=self.is_reduced(step)) for step in there}
            assert all(found[step] in (self.run[step], left.get(step)) for step in there)
            left = found
        type(self).reduced += sum(known.model_only and not self.run[step].model_only for step, known in left.items())
        self.run, self.saved = left, {step: self.saved[step] for step in left}

    @precondition(lambda self: not self.damaged)
    @rule(step=STEPS, base=BASES)
    def save_a_step(self, step: int, base: int) -> None:
        self.save(self.place, step, base)

    @precondition(lambda self: not self.damaged)
    @rule(step=STEPS, base=BASES, cut=CUTS, late=st.booleans())
    def save_and_die(self, step: int, base: int, cut: int, late: bool) -> None:
        self.save(DyingStorage(self.place, nth=cut, done=late), step, base)

    @precondition(lambda self: not self.damaged)
    @rule(step=STEPS, base=BASES, at=CUTS)
    def sweep_while_one_saves(self, step: int, base: int, at: int) -> None:
        self.save(self.meeting(at, lambda: sweep_blobs(self.place)), step, base)

    @precondition(lambda self: not self.damaged)
    @rule(step=STEPS, base=BASES, at=CUTS)
    def save_while_one_sweeps(self, step: int, base: int, at: int) -> None:
        sweep_blobs(self.meeting(at, lambda: self.save(self.place, step, base)))

    def meeting(self, at: int, act: Callable[[], object]) -> Any:
        """Before its `at`-th operation something else happens."""
        left = at

        def before(operation: Operation) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                act()

        return WatchedStorage(self.place, before)

    @precondition(lambda self: self.seeds)
    @rule(cut=CUTS, late=st.booleans())
    def sweep_and_die(self, cut: int, late: bool) -> None:
        with suppress(OSError):
            sweep_blobs(DyingStorage(self.place, nth=cut, done=late))  # type: ignore[arg-type]

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(data=st.data(), preserve=st.booleans(), cut=st.none() | CUTS, late=st.booleans())
    def delete(self, data: Any, preserve: bool, cut: int | None, late: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.saved)))
        left = {other: known for other, known in self.run.items() if other != step}
        if preserve:
            left[step] = replace(self.run[step], model_only=True)
        self.change(left, lambda manager: manager.delete_checkpoint(step, preserve_model=preserve), cut, late)

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(n=st.integers(1, 3), every=st.integers(1, 3), cut=st.none() | CUTS, late=st.booleans())
    def prune_to_models(self, n: int, every: int, cut: int | None, late: bool) -> None:
        """By a policy that keeps some models; the best step stays, unless its model does."""
        left = after(self.run, Keep((KeepLast(n),), False))
        models = {step: replace(known, model_only=True) for step, known in self.run.items() if step % every == 0}
        doomed = self.run.keys() - left.keys() - models.keys()
        scores = {step: known.score for step, known in self.run.items() if known.score is not None}
        if scores.keys() & doomed:
            best = KeepBest(1).ranking(scores)[0]
            left |= {best: self.run[best]} if best in doomed else {}
        policy = KeepLast(n) | PreserveModel(KeepEvery(steps=every))
        self.change(models | left, lambda manager: manager.prune(policy), cut, late)

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(n=st.integers(1, 3), best=st.booleans(), preserve=st.booleans(), cut=st.none() | CUTS, late=st.booleans())
    def prune(self, n: int, best: bool, preserve: bool, cut: int | None, late: bool) -> None:
        left = after(self.run, Keep((KeepBest(n) if best else KeepLast(n),), preserve))

        def act(manager: sc.CheckpointManager) -> None:
            (manager.keep_best_n_checkpoints if best else manager.keep_last_n_checkpoints)(n, preserve_model=preserve)

        self.change(left, act, cut, late)

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(data=st.data(), score=SCORES, cut=st.none() | st.integers(1, 4), late=st.booleans())
    def give_a_score(self, data: Any, score: float, cut: int | None, late: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.saved)))
        storage: Any = self.place if cut is None else DyingStorage(self.place, nth=cut, done=late)
        manager = sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)
        with suppress(sc.CheckpointError):
            manager.save_score(score, step=step)
        manager.close()
        found = read_scores(self.place, [Catalog(self.place).entry(step)]).by_step.get(step)
        assert found in ((score,) if cut is None else (score, self.run[step].score))
        self.run[step] = replace(self.run[step], score=found)

    @precondition(lambda self: self.seeds)
    @rule()
    def tidy(self) -> None:
        """What managers do in the hours after commits."""
        dead = DeadAttempts(Catalog(self.place), grace=timedelta(0))
        for _ in range(2):
            dead.tidy()
        sweep(Catalog(self.place), own_attempts={})

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(data=st.data())
    def damage_a_record(self, data: Any) -> None:
        key = f"{step_folder(data.draw(st.sampled_from(sorted(self.saved))))}/{MANIFEST}"
        try:
            content = self.place.read(key)
        except FileNotFoundError:  # it is in force beside its own name
            return
        self.damaged[key] = content
        self.place.replace(key, content[:-20])

    @precondition(lambda self: self.damaged)
    @rule()
    def bring_it_back(self) -> None:
        for key, content in self.damaged.items():
            self.place.replace(key, content)
        self.damaged.clear()

    @invariant()
    def what_is_named_is_there(self) -> None:
        type(self).rules_run += 1
        if self.damaged:
            return
        catalog = Catalog(self.place)
        assert catalog.steps() == sorted(self.saved)
        scores = {step: known.score for step, known in self.run.items() if known.score is not None}
        assert read_scores(self.place, catalog.entries()).by_step == scores
        for step in self.saved:
            folder, record = catalog.record(step)
            assert record.model_only == self.run[step].model_only
            for file in record.files:
                content = self.place.read(file.key_in(folder))
                assert (len(content), crc32(content)) == (file.nbytes, file.crc), (
                    f"{file.key_in(folder)} of step {step}"
                )

    def teardown(self) -> None:
        """In the end what no record names has gone, and every step loads.

        Records are also in what a crash left beside a step: a version that was exchanged for a newer one, and that
        nobody removes any more when that has been deleted, keeps its base.
        """
        if not hasattr(self, "place"):
            return
        self.bring_it_back()
        self.tidy()
        sweep_blobs(self.place)
        assert blobs(self.place) == references(self.place) >= named(self.place)
        assert {step: self.look(step) for step in self.saved} == self.saved


@pytest.mark.crash
@pytest.mark.timeout(7200)
def test_any_history(scale: Scale, scorecard: Scorecard, caplog: pytest.LogCaptureFixture) -> None:
    History.rules_run = History.reused = History.reduced = History.cut_off = 0
    examples = scale.runs(sample=15, full=1000)
    caplog.set_level(logging.CRITICAL, logger="shardckpt")  # what pytest keeps of it slows long runs down
    quick = settings(
        max_examples=examples,
        stateful_step_count=scale.runs(sample=20, full=40),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(History, settings=quick)
    assert History.reused
    assert History.reduced
    assert History.cut_off
    scorecard.add("histories with blobs (hypothesis)", runs=examples, notes=f"{History.rules_run} steps")
