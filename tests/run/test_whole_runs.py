"""Everything that happens to a run, in any order, against a plain dict of what must then be in it.

Saves, saves that fail or die on the way, scores, pruning that is cut short, resuming (which protects a step), copies
of steps under other names, foreign files, clocks that jump.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
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
from shardckpt.engine.committing import transaction
from shardckpt.run import deletion, scores
from shardckpt.run.catalog import Catalog
from shardckpt.run.retention import KeepBest, KeepLast
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage
from tests.faults.test_overwrite import DyingStorage, NoExchange
from tests.run.making import walk
from tests.run.test_retention_model import Keep, Run, Step, after
from tests.scorecard import Scale, Scorecard

LIMIT = timedelta(seconds=30)
STEPS = st.integers(0, 8)
PLACES = st.sampled_from([MemoryStorage, MemoryObjects, NoExchange])
CUTS = st.integers(1, 14)
NAMES = ("step_5 (copy)", "step_05", "step_5.bak", "backup/step_5", "step_-5", "Step_5", "step_5x")
"""What somebody might call the copy of a step."""


class Clock:
    """The wall clock of the machine, which its owner sets."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def now(self, zone: timezone) -> datetime:
        return datetime.now(zone) + self.ahead


def state_of(seed: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((5,), float(seed))}, "seed": seed}


class History(RuleBasedStateMachine):
    """`seeds` and `run` are what must be there."""

    clock = Clock()
    rules_run = 0

    @initialize(kind=PLACES)
    def begin(self, kind: type[Storage]) -> None:
        self.place: Any = kind()
        self.seeds: dict[int, int] = {}
        self.run: Run = {}
        self.foreign: dict[str, bytes] = {}
        self.saved = 0
        self.protected: frozenset[int] = frozenset()
        self.manager = self.a_manager(self.place)

    def a_manager(self, storage: Storage) -> sc.CheckpointManager:
        return sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT, tolerate=99)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()

    @property
    def next_seed(self) -> int:
        self.saved += 1
        return self.saved

    def is_there(self, step: int, seed: int) -> None:
        self.seeds[step] = seed
        self.run[step] = Step("own")

    @rule(step=STEPS)
    def save(self, step: int) -> None:
        seed = self.next_seed
        self.manager.save(step, state_of(seed)).result(LIMIT)
        self.is_there(step, seed)

    @rule(step=STEPS, cut=CUTS, how=st.sampled_from(["fails", "fails afterwards", "dies", "dies afterwards"]))
    def save_in_vain(self, step: int, cut: int, how: str) -> None:
        """By a job of its own. It may have come through all the same; what it was told must be true."""
        seed, late = self.next_seed, "afterwards" in how
        storage: Any = FailingStorage(self.place, nth=cut, after=late)
        if "dies" in how:
            storage = DyingStorage(self.place, nth=cut, done=late)
        error: sc.CheckpointError | None = None
        manager = self.a_manager(storage)
        try:
            manager.save(step, state_of(seed)).result(LIMIT)
        except sc.CheckpointError as caught:
            error = caught
        finally:
            manager.close()
        came_through = self.look(step) == seed
        if error is None:
            assert came_through, f"step {step} was promised"
        elif not isinstance(error, sc.CommitUnknownError):
            assert not came_through, f"told that it was not saved, but it is in force: {error}"
        if came_through:
            self.is_there(step, seed)

    def look(self, step: int) -> int | None:
        if step not in self.manager.steps():
            return None
        return int(self.manager.load_checkpoint(step)["seed"])

    @precondition(lambda self: self.seeds)
    @rule(data=st.data(), score=st.sampled_from([-1.0, 0.0, 0.5, 2.0]))
    def give_a_score(self, data: Any, score: float) -> None:
        step = data.draw(st.sampled_from(sorted(self.seeds)))
        self.manager.save_score(score, step=step)
        self.run[step] = Step("own", score)

    @rule(n=st.integers(1, 4), best=st.booleans())
    def prune(self, n: int, best: bool) -> None:
        keep = Keep((KeepBest(n) if best else KeepLast(n),), False, self.protected)
        (self.manager.keep_best_n_checkpoints if best else self.manager.keep_last_n_checkpoints)(n)
        self.run = after(self.run, keep)
        self.seeds = {step: self.seeds[step] for step in self.run}

    @rule(n=st.integers(1, 3), cut=CUTS)
    def prune_and_die(self, n: int, cut: int) -> None:
        """Nothing that was to stay has gone; of the others each is there or is not."""
        stay = after(self.run, Keep((KeepLast(n),), False))
        manager = self.a_manager(DyingStorage(self.place, nth=cut, done=False))
        try:
            manager.keep_last_n_checkpoints(n)
        except sc.CheckpointError:
            pass
        finally:
            manager.close()
        left = set(self.manager.steps())
        assert set(stay) <= left <= set(self.run)
        self.run = {step: self.run[step] for step in left}
        self.seeds = {step: self.seeds[step] for step in left}

    @rule()
    def resume(self) -> None:
        state = state_of(0)
        info = self.manager.resume(state)
        if not self.seeds:
            assert info is None
            return
        assert info is not None
        assert (info.step, info.skipped) == (max(self.seeds), ())
        assert state["seed"] == self.seeds[info.step]
        self.protected |= {info.step}

    @rule()
    def a_new_job(self) -> None:
        self.manager.close()
        self.manager, self.protected = self.a_manager(self.place), frozenset()

    @precondition(lambda self: self.seeds)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def copy(self, data: Any, name: str) -> None:
        # Where it is in force: aside, if a save that was to replace it broke off where folders cannot be exchanged.
        folder = Catalog(self.place).record(data.draw(st.sampled_from(sorted(self.seeds))))[0]
        for key in walk(self.place, folder):
            self.lay(name + key.removeprefix(folder), self.place.read(key))

    @rule(name=st.sampled_from(["notes.txt", "step_3.txt", "cc/x", "latest/manifest.json", "manifest.json"]))
    def foreign_file(self, name: str) -> None:
        self.lay(name, b"mine")

    def lay(self, key: str, content: bytes) -> None:
        if key not in self.foreign:
            self.foreign[key] = content
            self.place.put(key, [content])

    @rule(hours=st.sampled_from([-10_000, -1, 1, 10_000]))
    def the_clock_jumps(self, hours: int) -> None:
        type(self).clock.ahead = timedelta(hours=hours)

    @invariant()
    def it_is_as_it_must_be(self) -> None:
        type(self).rules_run += 1
        assert self.manager.steps() == sorted(self.seeds)
        for step in sorted(self.seeds)[-2:]:
            state = self.manager.load_checkpoint(step)
            assert torch.equal(state["model"]["w"], state_of(self.seeds[step])["model"]["w"])
        given = scores.read_scores(self.place, Catalog(self.place).entries()).by_step
        assert given == {step: known.score for step, known in self.run.items() if known.score is not None}
        for key, content in self.foreign.items():
            assert self.place.read(key) == content, f"{key} is not ours"


def play(kind: type[History], examples: int, length: int, *, phases: tuple[Phase, ...] = tuple(Phase)) -> int:
    kind.rules_run = 0
    quick = settings(
        max_examples=examples,
        stateful_step_count=length,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(kind, settings=quick)
    return kind.rules_run


@pytest.mark.crash
@pytest.mark.timeout(7200)
def test_any_history(monkeypatch: pytest.MonkeyPatch, scale: Scale, scorecard: Scorecard) -> None:
    monkeypatch.setattr(transaction, "datetime", History.clock)
    History.clock.ahead = timedelta(0)
    examples, length = scale.runs(sample=50, full=1000), scale.runs(sample=30, full=50)
    done = play(History, examples, min(length, 50))
    scorecard.add("histories of a run (hypothesis)", runs=examples, notes=f"{done} steps")


class OnObjects(History):
    @initialize(kind=st.just(MemoryObjects))
    def begin(self, kind: type[Storage]) -> None:
        super().begin(kind)


def test_a_score_that_outlives_what_it_was_given_to_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On object stores, if it lay beside the record and not in the folder of its attempt."""
    monkeypatch.setattr(transaction, "datetime", History.clock)
    for module in (scores, deletion):
        monkeypatch.setattr(module, "score_key", lambda entry: f"{entry.folder}/score.txt")
    with pytest.raises(AssertionError):
        play(OnObjects, 100, 30, phases=(Phase.generate,))  # nobody reads the shortest example
