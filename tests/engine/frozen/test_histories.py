"""Saves that share bases, deletions, sweeps and crashes, in any order and in the middle of each other: what a record
names is there, and what none names goes in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
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
from shardckpt.run.shared.references import references
from shardckpt.run.shared.sweeping import sweep_blobs
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.tools.contents import files_below
from tests.faults.test_overwrite import DyingStorage, NoExchange
from tests.run.faulty import WatchedStorage
from tests.scorecard import Scale, Scorecard

LIMIT = timedelta(seconds=30)
STEPS, BASES = st.integers(0, 5), st.integers(0, 2)
PLACES = st.sampled_from([MemoryStorage, MemoryObjects, NoExchange])
CUTS = st.integers(1, 25)


def state_of(base: int, seed: int) -> dict[str, Any]:
    return {"base": torch.full((50,), float(base)), "seed": seed}


def named(place: Storage) -> set[str]:
    catalog = Catalog(place)
    return {file.blob for entry in catalog.entries() for file in catalog.record(entry)[1].files if file.blob}


def blobs(place: Storage) -> set[str]:
    return {f"{BLOBS}/{name}" for name in files_below(place, BLOBS) if name.endswith(".pt")}


class History(RuleBasedStateMachine):
    """`saved` is what must be there: by step its base and its seed."""

    rules_run = reused = 0

    @initialize(kind=PLACES)
    def begin(self, kind: type[Storage]) -> None:
        self.place: Any = kind()
        self.saved: dict[int, tuple[int, int]] = {}
        self.seeds = 0
        self.damaged: dict[str, bytes] = {}

    def save(self, storage: Storage, step: int, base: int) -> None:
        """By a job of its own, which may die; what is there then is one or the other."""
        self.seeds += 1
        error: sc.CheckpointError | None = None
        before, manager = blobs(self.place), sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)
        try:
            manager.save(step, state_of(base, self.seeds), frozen=("base",)).result(LIMIT)
        except sc.CheckpointError as caught:
            error = caught
        finally:
            manager.close()
        if error is None or self.look(step) == (base, self.seeds):
            self.saved[step] = (base, self.seeds)
            type(self).reused += blobs(self.place) == before

    def look(self, step: int) -> tuple[int, int] | None:
        state = state_of(0, 0)
        with sc.CheckpointManager(self.place, sc.Gangs.local(), timeout=LIMIT) as manager:
            if step not in manager.steps():
                return None
            manager.load(step, state)
        return int(state["base"][0]), state["seed"]

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

    @rule(cut=CUTS, late=st.booleans())
    def sweep_and_die(self, cut: int, late: bool) -> None:
        with suppress(OSError):
            sweep_blobs(DyingStorage(self.place, nth=cut, done=late))  # type: ignore[arg-type]

    @precondition(lambda self: self.saved and not self.damaged)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        step = data.draw(st.sampled_from(sorted(self.saved)))
        with sc.CheckpointManager(self.place, sc.Gangs.local(), timeout=LIMIT) as manager:
            manager.delete_checkpoint(step)
        del self.saved[step]

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
        for step in self.saved:
            folder, record = catalog.record(step)
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
    History.rules_run = History.reused = 0
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
    scorecard.add("histories with blobs (hypothesis)", runs=examples, notes=f"{History.rules_run} steps")
