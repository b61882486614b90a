"""A save thread that hangs in Python is replaced; what it does when it wakes up harms nobody."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.background import lease as module
from shardckpt.engine.background.lease import Lease, LeasedGang, LeaseTakenError, Watch
from shardckpt.engine.committing.transaction import Transaction
from shardckpt.engine.patience import Limit
from shardckpt.gang.local import LocalGang
from shardckpt.storage.memory import MemoryStorage

LIMIT_S = 20.0
SOON = timedelta(seconds=0.3)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.3)


def test_what_was_taken_away_is_not_held_again() -> None:
    lease = Lease()
    gang = LeasedGang(LocalGang(), lease)
    gang.enter("one", timeout=SOON)
    assert gang.gather(1, timeout=SOON) == [1]
    assert not lease.take(60.0), "it has just been seen"
    assert lease.take(0.0)
    for act in (lambda: gang.gather(1, timeout=SOON), lambda: gang.broadcast(1, timeout=SOON)):
        with pytest.raises(LeaseTakenError):
            act()


def test_it_is_not_taken_away_in_the_middle_of_an_act() -> None:
    lease, begun, go_on = Lease(), threading.Event(), threading.Event()
    given_up = threading.Event()

    def act() -> None:
        with lease.held():
            begun.set()
            assert go_on.wait(LIMIT_S)

    thread = threading.Thread(target=act)
    with Watch(lease, Limit(timedelta(0)), given_up.set):
        thread.start()
        assert begun.wait(LIMIT_S)
        assert not given_up.wait(0.8)
        go_on.set()
        thread.join()
        assert given_up.wait(LIMIT_S), "now it has been idle"


def test_who_is_seen_again_and_again_is_not_given_up() -> None:
    lease, given_up = Lease(), threading.Event()
    with Watch(lease, Limit(timedelta(seconds=0.5)), given_up.set):
        for _ in range(8):
            with lease.held():
                pass
            assert not given_up.wait(0.2)
    assert not given_up.is_set()
    assert all(thread.name != "shardckpt-watch" for thread in threading.enumerate())


class Hanging(logging.Handler):
    """As one that sends to a server which does not answer."""

    def __init__(self, said: str) -> None:
        super().__init__()
        self.said = said
        self.over = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.said in record.getMessage():
            assert self.over.wait(LIMIT_S)


def test_a_logger_that_hangs_after_the_commit_holds_up_no_save() -> None:
    handler, log = Hanging("step 1 committed"), logging.getLogger("shardckpt")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), timeout=timedelta(seconds=2)) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, {"w": torch.ones(3)}).result(timedelta(seconds=LIMIT_S))
            assert checkpoints.steps() == [1, 2]
    finally:
        handler.over.set()
        log.removeHandler(handler)
        log.setLevel(before)


@pytest.mark.parametrize("at", ["begin", "compare", "commit", "_put_in_force", "abandon"])
def test_a_thread_that_wakes_up_late_commits_nothing(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """It goes on with the real method, whatever else has been committed since."""
    woken, real = threading.Event(), getattr(Transaction, at)
    armed = [True]

    def hanging(self: Transaction, *args: object, **options: object) -> object:
        if armed and self._step == 2:
            armed.clear()
            assert woken.wait(LIMIT_S)
        return real(self, *args, **options)

    monkeypatch.setattr(Transaction, at, hanging)
    if at == "abandon":
        compare = Transaction.compare
        monkeypatch.setattr(Transaction, "compare", lambda self, alike: compare(self, alike) or 1 // (self._step - 2))
    place = MemoryStorage()
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=timedelta(seconds=30)) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(3)}).result()
        began = time.monotonic()
        pending = checkpoints.save(2, {"w": torch.ones(3)}, deadline=SOON)
        with pytest.raises(sc.CheckpointSaveError) as caught:
            pending.result(timedelta(seconds=LIMIT_S))
        assert time.monotonic() - began < LIMIT_S / 2
        assert not isinstance(caught.value, sc.CommitUnknownError), "it is known that it was not"
        checkpoints.save(3, {"w": torch.ones(3)}).result(timedelta(seconds=LIMIT_S))
        zombies = [thread for thread in threading.enumerate() if thread.name == "shardckpt-save"]
        assert len(zombies) == 2
        woken.set()
    for thread in zombies:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert [name for name in place.list() if name.startswith("step_2")] in ([], ["step_2.tmp/"])
    with sc.CheckpointManager(place, sc.Gangs.local()) as checkpoints:
        assert checkpoints.steps() == [1, 3]
