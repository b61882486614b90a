"""Each system call of a save, the same step again, a prune, a load, an export fails in turn, in each way that it can.

What was to be done is done or not there at all; the error names the place and what to do; the step before still loads;
the next try works; nothing stays open.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import local
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix.explain import _ADVICE
from tests.faults.calls.system import Fault, System, install
from tests.scorecard import Scale, Scorecard

LIMIT = timedelta(seconds=30)
OLD, NEW = 1, 2


def made(seed: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((2000,), float(seed))}, "own": {"n": torch.tensor([seed])}, "value": seed}


def same(state: dict[str, Any], seed: int) -> bool:
    want = made(seed)
    found = torch.equal(state["model"]["w"], want["model"]["w"]), torch.equal(state["own"]["n"], want["own"]["n"])
    return all(found) and state["value"] == seed


def manager(root: Path) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, sc.Gangs.local(), timeout=LIMIT)


def save(checkpoints: sc.CheckpointManager, step: int, seed: int) -> None:
    checkpoints.save(step, made(seed)).result(LIMIT)


def export(checkpoints: sc.CheckpointManager) -> None:
    model = torch.nn.Linear(40, 40)
    torch.nn.init.constant_(model.weight, 7.0)
    checkpoints.begin_checkpoint(3)
    checkpoints.save_state({"value": NEW})
    checkpoints.save_consolidated_fsdp_model(model)
    checkpoints.commit_checkpoint()


def load(checkpoints: sc.CheckpointManager) -> None:
    """What fails leaves the state as it was, or says that it did not."""
    state = made(77)
    try:
        checkpoints.load(2, state)
    except sc.CheckpointError as error:
        if not same(state, 77) and "do not go on with it" not in str(error):
            raise AssertionError("the state has changed") from error
        raise
    assert same(state, OLD)


Work = Callable[[sc.CheckpointManager], None]


@dataclass(frozen=True)
class Verb:
    """What is done beside steps 1 and 2, and which steps there may be before and after it: their seeds by number."""

    work: Work
    before: dict[int, int]
    after: dict[int, int]


TWO = {1: OLD, 2: OLD}
VERBS = {
    "save": Verb(lambda it: save(it, 3, NEW), TWO, {**TWO, 3: NEW}),
    "save again": Verb(lambda it: save(it, 2, NEW), TWO, {**TWO, 2: NEW}),
    "prune": Verb(lambda it: it.keep_last_n_checkpoints(1), TWO, {2: OLD}),
    "load": Verb(load, TWO, TWO),
    "export": Verb(export, TWO, {**TWO, 3: 0}),
    "score": Verb(lambda it: it.save_score(0.5, step=2), TWO, TWO),
}


def attempt(work: Work, root: Path) -> sc.CheckpointError | None:
    """A manager's whole life; its error, if it is one of ours."""
    try:
        with manager(root) as checkpoints:
            work(checkpoints)
    except sc.CheckpointError as error:
        return error
    return None


def seed_of(checkpoints: sc.CheckpointManager, step: int) -> int:
    """Which state is in a step: one of them, whole. 0 for what was exported."""
    state = checkpoints.load_checkpoint(step)
    if "own" not in state:
        assert state["value"] == NEW
        return 0
    matching = [seed for seed in (OLD, NEW) if same(state, seed)]
    assert matching, f"a mixture: {state}"
    return matching[0]


def judge(verb: Verb, error: sc.CheckpointError | None, seeds: dict[int, int]) -> None:
    """What the caller was told must be true, and nothing in between may be there."""
    assert seeds in (verb.before, verb.after), seeds
    if error is None:
        assert seeds == verb.after
    elif isinstance(error, sc.CheckpointSaveError) and not isinstance(error, sc.CommitUnknownError):
        assert seeds == verb.before, f"told that it was not saved, but it is in force: {error}"


def says_where_and_what_to_do(error: sc.CheckpointError, fault: Fault, root: Path) -> None:
    assert str(root) in str(error), error
    assert any(_ADVICE[code] in str(error) for code in (fault.code, errno.EIO)), error


def look_and_try_again(verb: Verb, error: sc.CheckpointError | None, root: Path) -> None:
    """A new job, where nothing fails any more."""
    with manager(root) as checkpoints:
        judge(verb, error, {step: seed_of(checkpoints, step) for step in checkpoints.steps()})
        verb.work(checkpoints)
        assert checkpoints.steps() == sorted(verb.after)
        last = max(verb.after)
        assert seed_of(checkpoints, last) == verb.after[last]


def strike(system: System, template: Path, verb: Verb, nth: int, choice: int) -> bool:
    """One row; False if there are not so many calls."""
    root, files = template.with_name(f"{nth}-{choice}"), len(os.listdir("/proc/self/fd"))
    shutil.copytree(template, root)
    with system.failing(nth, choice):
        error = attempt(verb.work, root)
    if system.struck is not None:
        assert len(os.listdir("/proc/self/fd")) <= files
        if error is not None:
            says_where_and_what_to_do(error, system.struck, root)
            if not system.struck.lasting and type(error) is sc.CheckpointSaveError:
                assert [path.name for path in root.iterdir() if path.suffix] == []
        look_and_try_again(verb, error, root)
    shutil.rmtree(root)
    return system.struck is not None


def sweep(system: System, template: Path, verb: Verb, *, full: bool) -> int:
    """Each call, in one way, or in each way that it can fail; how many rows that were."""
    rows = 0
    for nth in itertools.count(1):
        if not strike(system, template, verb, nth, nth):
            return rows
        others = [choice for choice in range(system.choices) if choice != nth % system.choices] if full else []
        rows += 1 + sum(strike(system, template, verb, nth, choice) for choice in others)
    raise AssertionError("it has no end")


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return install(monkeypatch)


@pytest.fixture
def template(system: System, tmp_path: Path) -> Path:
    """A run of two steps."""
    root = tmp_path / "template"
    with manager(root) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step, OLD)
    return root


@pytest.mark.crash
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", VERBS)
@pytest.mark.sampled(2)
def test_every_call_in_turn(system: System, template: Path, name: str, scale: Scale, scorecard: Scorecard) -> None:
    rows = sweep(system, template, VERBS[name], full=scale.factor is None)
    scorecard.add("I/O error at the n-th call, for every n", runs=rows)
    assert rows > 15


def test_an_error_that_the_storage_keeps_to_itself_is_found(
    system: System, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalStorage.put

    def put(self: LocalStorage, key: str, parts: Any) -> int:
        with suppress(OSError):
            return real(self, key, parts)
        return sum(memoryview(part).nbytes for part in parts)

    monkeypatch.setattr(LocalStorage, "put", put)
    with pytest.raises((AssertionError, sc.CheckpointDamagedError)):
        sweep(system, template, VERBS["save"], full=False)


def test_a_descriptor_that_a_failure_leaves_open_is_found(
    system: System, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    real = local.sync_descriptor

    def sync(folder: int) -> None:
        try:
            real(folder)
        except OSError:
            left.append(os.dup(folder))
            raise

    monkeypatch.setattr(local, "sync_descriptor", sync)
    try:
        with pytest.raises(AssertionError, match="<="):
            sweep(system, template, VERBS["save"], full=False)
    finally:
        for descriptor in left:
            os.close(descriptor)
