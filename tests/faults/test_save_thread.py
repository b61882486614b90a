"""Each phase of the save in the background x each rank x {raises, hangs, is killed}: training goes on, the step is
absent, every rank knows, and the next commits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.background import lease
from shardckpt.engine.committing.transaction import Transaction
from shardckpt.engine.saving.stage import Staging
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.gangs import run_ranks

RANKS = 2
PATIENT = timedelta(seconds=20)
DEADLINE = timedelta(seconds=0.7)
"""Of the save that meets a hang."""
LIMIT_S = 15.0


@dataclass
class Fault:
    """What happens, once, when the victim comes to the phase of step 2."""

    kind: str
    victim: int
    armed: bool = False
    met: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    """Lets what hangs go on, at the end of the test."""

    def strike(self, rank: int) -> None:
        if not self.armed or rank != self.victim:
            return
        self.armed = False
        self.met.set()
        if self.kind == "hangs":
            assert self.over.wait(2 * LIMIT_S)
        elif self.kind == "raises":
            raise RuntimeError("injected")
        else:
            raise SystemExit("injected")


class Struck(StorageWrapper):
    """Meets the fault before an operation on one of the keys."""

    def __init__(self, inner: Storage, fault: Fault, rank: int, phase: tuple[str, str]) -> None:
        super().__init__(inner)
        self._fault, self._rank, self._phase = fault, rank, phase

    def around(self, operation: Operation, call: Callable[[], Any]) -> Any:
        name, key = self._phase
        if operation.name == name and any(key in each for each in operation.keys):
            self._fault.strike(self._rank)
        return call()


IN_STORAGE = {
    "make room": ("make_folder", "step_2"),
    "write": ("put", "rank_"),
    "record": ("put", "manifest.json"),
    "rename": ("rename_folder", "step_2"),
}
IN_CLASS: dict[str, tuple[type, str, Callable[[Any], int]]] = {
    "copy": (Staging, "copy", lambda staging: int(staging._rank)),
    "seal": (Staging, "seal", lambda staging: int(staging._rank)),
    "meet": (Transaction, "begin", lambda attempt: int(attempt._gang.rank)),
    "compare": (Transaction, "compare", lambda attempt: int(attempt._gang.rank)),
    "commit": (Transaction, "commit", lambda attempt: int(attempt._gang.rank)),
}
ON_RANK_0 = ("make room", "record", "rename", "compare", "commit")
"""In the last two the others have nothing to say: where one of these ends, the step is committed all the same."""
ROWS = [
    (phase, kind, victim)
    for phase in (*IN_CLASS, *IN_STORAGE)
    for kind in ("raises", "hangs", "is killed")
    for victim in range(RANKS)
    if not (victim and phase in ON_RANK_0)
]


class Training:
    """A model that every rank holds a copy of, with its optimizer."""

    def __init__(self, rank: int) -> None:
        self.weight = torch.nn.Parameter(torch.full((40_000,), float(rank)))
        model = torch.nn.ParameterDict({"weight": self.weight})
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        # Not as a model, which all ranks would have to hold alike.
        self.state: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "rank": rank}

    def step(self) -> None:
        self.weight.grad = torch.ones_like(self.weight)
        self.optimizer.step()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("phase", "kind", "victim"), ROWS)
def test_training_goes_on_and_the_next_save_commits(
    monkeypatch: pytest.MonkeyPatch, phase: str, kind: str, victim: int
) -> None:
    monkeypatch.setattr(lease, "_GRACE_S", 1.0)
    fault, place = Fault(kind, victim), MemoryStorage()
    waits = kind == "hangs" or phase in ("compare", "commit")
    if phase in IN_CLASS:
        put_in_the_way(monkeypatch, fault, phase)

    def act(gangs: sc.Gangs) -> tuple[list[int], float]:
        rank = gangs.root.rank
        storage = Struck(place, fault, rank, IN_STORAGE[phase]) if phase in IN_STORAGE else place
        training = Training(0)
        with sc.CheckpointManager(storage, gangs, timeout=PATIENT) as checkpoints:
            checkpoints.save(1, training.state).result()
            if rank == victim:
                fault.armed = True
            training.step()
            pending = checkpoints.save(2, training.state, deadline=DEADLINE if waits else None)
            training.step()  # whatever has become of the copy
            with pytest.raises(sc.CheckpointSaveError) as caught:
                pending.result(timedelta(seconds=LIMIT_S))
            assert caught.value.step == 2
            assert rank == victim or f"rank {victim}" in str(caught.value)
            held = training.weight.detach().clone()
            checkpoints.save(3, training.state).result()
            training.step()
            steps = checkpoints.steps()
            fault.over.set()
            checkpoints.load(3, training.state)
            assert torch.equal(training.weight, held)
            return steps, pending.report.stall_s

    with ExitStack() as stack:
        stack.callback(fault.over.set)
        results = run_ranks(RANKS, act)
    assert fault.met.is_set(), "else nothing has been tested"
    for steps, stall_s in results:
        assert steps == [1, 3]
        assert stall_s < LIMIT_S / 2


@pytest.mark.parametrize("victim", range(RANKS))
def test_who_is_given_up_before_it_came_does_not_fail_the_next_save(
    monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """The others still wait for it in the scope of the save that it has given up; it goes to the next one."""
    monkeypatch.setattr(lease, "_GRACE_S", 0.5)
    fault, place = Fault("hangs", victim), MemoryStorage()
    put_in_the_way(monkeypatch, fault, "meet")

    def act(gangs: sc.Gangs) -> list[int]:
        is_victim = gangs.root.rank == victim
        training = Training(0)
        with sc.CheckpointManager(place, gangs, timeout=PATIENT) as checkpoints:
            fault.armed = fault.armed or is_victim
            pending = checkpoints.save(1, training.state, deadline=DEADLINE if is_victim else 10 * DEADLINE)
            with pytest.raises(sc.CheckpointSaveError) as caught:
                pending.result(timedelta(seconds=LIMIT_S))
            assert is_victim or f"rank {victim} is in scope 'save/2" in str(caught.value)
            checkpoints.save(2, training.state).result()
            return checkpoints.steps()

    with ExitStack() as stack:
        stack.callback(fault.over.set)
        assert run_ranks(RANKS, act) == [[2]] * RANKS
    assert fault.met.is_set(), "else nothing has been tested"


def put_in_the_way(monkeypatch: pytest.MonkeyPatch, fault: Fault, phase: str) -> None:
    owner, name, rank_of = IN_CLASS[phase]
    real = getattr(owner, name)

    def struck(self: Any, *args: Any, **options: Any) -> Any:
        if threading.current_thread().name.startswith("shardckpt-"):
            fault.strike(rank_of(self))
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, struck)


def kill(name: str) -> None:
    """Every thread of that name: an exception out of nowhere, at its next instruction."""
    for thread in threading.enumerate():
        if thread.name == name and thread.ident is not None:
            kind = ctypes.py_object(SystemExit)
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), kind) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_are_killed_between_two_saves_are_replaced() -> None:
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), timeout=PATIENT) as checkpoints:
        training = Training(0)
        for step in range(1, 4):
            checkpoints.save(step, training.state).result(timedelta(seconds=LIMIT_S))
            training.step()
            for worker in (checkpoints._saver._thread, checkpoints._saver._copier):
                worker.join()  # CPython 3.11 would strike a thread that this one is just about to start
            kill("shardckpt-save")
            kill("shardckpt-copy")
        assert checkpoints.steps() == [1, 2, 3]


def test_a_save_whose_thread_is_killed_while_it_waits_for_the_storage() -> None:
    """The writer is left behind, with the memory that it writes from; the next save has other memory."""
    place, fault = MemoryStorage(), Fault("hangs", 0, armed=True)
    storage = Struck(place, fault, 0, ("put", "rank_"))
    with sc.CheckpointManager(storage, sc.Gangs.local(), timeout=PATIENT) as checkpoints:
        pending = checkpoints.save(1, {"w": torch.zeros(9)})
        assert fault.met.wait(LIMIT_S)
        before = checkpoints._saver._flights._stagers[0].nbytes
        kill("shardckpt-save")
        # What waits for a lock is only told when it wakes up: let it, by what it waits for.
        threading.Timer(0.2, fault.over.set).start()
        with pytest.raises(sc.CheckpointSaveError):
            pending.result(timedelta(seconds=LIMIT_S))
        assert before > 0
        assert checkpoints._saver._flights._stagers[0].nbytes == 0
        checkpoints.save(2, {"w": torch.ones(9)}).result(timedelta(seconds=LIMIT_S))
        assert checkpoints.steps() == [2]
