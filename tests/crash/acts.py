"""What is done while the power may fail: one entry per operation, run by every rank of a small job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from torch import nn

import shardckpt as sc
from shardckpt.engine.saving import share
from shardckpt.format.layout import MANIFEST, aside_folder, step_folder
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.crash.operations import Recording
from shardckpt.testing.crash.recorder import LeaveOut, Recorder
from shardckpt.testing.crash.requests import RecordedObjects
from shardckpt.testing.gangs import run_ranks
from tests.crash.ours import FOREIGN, LIMIT, make_state, rebuilt

ROOT = "run"


class Watch(Protocol):
    """Who is told of promises: a recorder of system calls, or of requests."""

    def begun(self, step: int, version: object) -> None: ...
    def acknowledged(self, step: int, version: object) -> None: ...


@dataclass(frozen=True)
class Hand:
    """One rank at work: its manager, the place as it sees it, and whom it tells what was promised to it."""

    manager: sc.CheckpointManager
    storage: Storage
    watch: Watch
    rank: int
    width: int
    frozen: tuple[str, ...] = ()

    def start(self, step: int, version: int) -> sc.PendingSave:
        self.watch.begun(step, version)
        state = make_state(self.rank, version, width=self.width)
        return self.manager.save(step, state, replicated=("model",), frozen=self.frozen)

    def end(self, pending: sc.PendingSave, version: int) -> None:
        pending.result()
        self.watch.acknowledged(pending.step, version)

    def save(self, step: int, version: int) -> None:
        self.end(self.start(step, version), version)


@dataclass(frozen=True)
class Act:
    """An operation: what each rank does, with a manager made with these options."""

    run: Callable[[Hand], None]
    ranks: tuple[int, ...] = (1, 2, 3, 4)
    options: dict[str, Any] = field(default_factory=dict)
    exchanges: bool = True
    foreign: bool = True
    """Whether others' files lie in the root; if not, the root itself is not there yet."""
    shared: bool = False
    """Whether ranks write one file together, however small it is."""
    frozen: tuple[str, ...] = ()
    """What is stored once, and referred to by later steps."""

    @property
    def width(self) -> int:
        return 3000 if self.shared else 600


def two_steps(hand: Hand) -> None:
    hand.save(1, 1)
    hand.save(2, 2)


def again(hand: Hand) -> None:
    hand.save(5, 1)
    hand.save(5, 2)
    hand.save(5, 3)


def pruned(hand: Hand) -> None:
    """KeepLast(1): a save lets the step before go, once it is in force itself."""
    hand.save(1, 1)
    for step in (2, 3):
        hand.watch.begun(step - 1, None)
        hand.save(step, step)


def deleted(hand: Hand) -> None:
    hand.save(1, 1)
    hand.save(2, 2)
    hand.watch.begun(1, None)
    hand.manager.delete_checkpoint(1)
    hand.watch.acknowledged(1, None)
    hand.watch.begun(2, ("model", 2))
    hand.manager.delete_checkpoint(2, preserve_model=True)
    hand.watch.acknowledged(2, ("model", 2))


def in_background(hand: Hand) -> None:
    """Two saves under way at a time; what was promised is known late."""
    first, second = hand.start(1, 1), hand.start(2, 2)
    third = hand.start(2, 3)
    for pending, version in ((first, 1), (second, 2), (third, 3)):
        hand.end(pending, version)


def with_blobs(hand: Hand) -> None:
    """Two steps that share a base, of which the first goes; another base; and the first base again, when the last step
    that had it has gone: KeepLast(1) deletes a blob, puts a new one of the same content, and deletes the other."""
    hand.save(1, 1)
    for step, version in ((2, 1), (3, 2), (4, 1)):
        hand.watch.begun(step - 1, None)
        hand.save(step, version)


def scored(hand: Hand) -> None:
    hand.save(1, 1)
    hand.manager.save_score(0.5, step=1)
    hand.save(2, 2)
    hand.manager.save_score(0.25, step=2)
    hand.manager.save_score(0.75, step=2)


def pinned_and_measured(hand: Hand) -> None:
    """KeepLast(1) deletes the second step, and never the first, which is pinned before that."""
    hand.save(1, 1)
    hand.manager.save_metrics({"loss": 1.0}, step=1)
    hand.manager.pin(1)
    hand.save(2, 2)
    hand.manager.save_metrics({"loss": 0.5}, step=2)
    hand.manager.save_metrics({"accuracy": 0.25}, step=2)
    hand.watch.begun(2, None)
    hand.save(3, 3)


def transaction(hand: Hand, *, export: bool) -> None:
    """fairseq2's form; with `export` the whole model in a file of its own beside the state."""
    for step, version in ((1, 1), (2, 2), (2, 3)):
        state = make_state(hand.rank, version)
        hand.watch.begun(step, version)
        hand.manager.begin_checkpoint(step)
        replicated = () if export else ("model",)
        hand.manager.save_state(state, replicated_keys=replicated, model_key="net" if export else "model")
        hand.manager.save_metadata({"version": version})
        hand.manager.save_score(float(version))
        if export:
            model = nn.Linear(20, 2)
            nn.init.constant_(model.weight, float(version))
            nn.init.constant_(model.bias, float(version))
            hand.manager.save_consolidated_fsdp_model(model)
        hand.manager.commit_checkpoint()
        hand.watch.acknowledged(step, version)


def repaired(hand: Hand, *, attempt: bool) -> None:
    """The record of a step is lost, and rank 0 makes it anew. With `attempt` the folder has lost its name as well, as
    if the step had been written and not committed; on an object store that is the same."""
    hand.save(1, 1)
    hand.save(2, 2)
    if hand.rank != 0:
        return
    hand.watch.begun(2, None)
    written = Catalog(hand.storage).record(2)[1]
    record = f"{step_folder(2)}/{MANIFEST}"
    if isinstance(hand.storage, RecordedObjects):
        hand.storage.lose(record)
    else:
        hand.storage.delete([record])
    if attempt and isinstance(hand.storage, RenamingStorage):
        hand.storage.rename_folder(step_folder(2), aside_folder(2, written.attempt, "tmp"))
    hand.watch.begun(2, rebuilt(2))
    assert sc.repair(hand.storage, step=2, apply=True).applied
    hand.watch.acknowledged(2, rebuilt(2))


ACTS: dict[str, Act] = {
    "save": Act(two_steps, foreign=False),
    "save, files shared by ranks": Act(two_steps, ranks=(2, 3), shared=True),
    "same step again": Act(again),
    "same step again, no exchange": Act(again, ranks=(1, 2), exchanges=False),
    "prune": Act(pruned, options={"keep": sc.KeepLast(1)}),
    "delete, keep model": Act(deleted, ranks=(1, 2)),
    "async": Act(in_background, options={"saving": sc.SavePolicy(in_flight=2)}),
    "blobs": Act(with_blobs, ranks=(2,), options={"keep": sc.KeepLast(1)}, frozen=("model",)),
    "score": Act(scored, ranks=(1,)),
    "pins and metrics": Act(pinned_and_measured, ranks=(1,), options={"keep": sc.KeepLast(1)}),
    "transaction": Act(partial(transaction, export=False), ranks=(1, 2)),
    "export": Act(partial(transaction, export=True)),
    "repair": Act(partial(repaired, attempt=False), ranks=(1, 2)),
    "repair, an attempt": Act(partial(repaired, attempt=True), ranks=(2,)),
}
"""By name."""

CASES = [(name, ranks) for name, act in ACTS.items() for ranks in act.ranks]


def record(
    act: Act,
    ranks: int,
    folder: Path,
    *,
    leave_out: LeaveOut = lambda call: False,
    spoilt: Callable[[], Any] | None = None,
) -> Recording:
    """The operations of a job in an empty folder, whose root is the folder `ROOT` in it. `spoilt`: a context in which
    the engine has a fault."""
    if act.foreign:
        for key, content in FOREIGN.items():
            (folder / ROOT / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / ROOT / key).write_bytes(content)
    recorder = Recorder(str(folder), leave_out=leave_out, exchanges=act.exchanges)
    with recorder.watching(), _shares(act), (spoilt or _sound)():
        work(act, ranks, lambda: LocalStorage(folder / ROOT), recorder)
    return recorder.recording


def work(act: Act, ranks: int, place: Callable[[], Any], watch: Watch) -> None:
    """Let every rank of a job do it, each as a thread with a manager of its own."""

    def run(gangs: sc.Gangs) -> None:
        storage = place()
        with sc.CheckpointManager(storage, gangs, timeout=LIMIT, **act.options) as manager:
            act.run(Hand(manager, storage, watch, gangs.root.rank, act.width, act.frozen))

    run_ranks(ranks, run)


@contextmanager
def _shares(act: Act) -> Iterator[None]:
    if not act.shared:
        yield
        return
    with mock.patch.multiple(share, LEAST=4096, _GRAIN=4096):
        yield


@contextmanager
def _sound() -> Iterator[None]:
    yield
