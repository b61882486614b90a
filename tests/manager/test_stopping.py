"""A signal to one rank: all stop at one step, saved in time; and what becomes of signals and their handlers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.manager.signals import SignalWatch
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import GatedStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import blank_state, make_state, same

ROOT = Path(__file__).parents[2]
USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    watched = (signal.SIGTERM, signal.SIGINT, USR1, USR2)
    before = [signal.getsignal(number) for number in watched]
    yield
    assert [signal.getsignal(number) for number in watched] == before


def strike(number: int) -> None:
    """Send this process a signal, and see it handled."""
    signal.raise_signal(number)


def local(place: Any, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(place, sc.Gangs.local(), **options)


def test_a_signal_makes_the_next_step_the_last() -> None:
    place = MemoryStorage()
    with local(place) as checkpoints:
        checkpoints.stop_on()
        assert not any(checkpoints.should_stop(step) for step in range(1, 5))
        strike(signal.SIGTERM)
        assert not checkpoints.should_stop(4)
        assert checkpoints.should_stop(5)
        checkpoints.save(5, make_state(0, 5))
        strike(signal.SIGTERM)  # while it is being written: torchrun sends on what it gets
    with local(place) as checkpoints:
        state = blank_state(0)
        assert checkpoints.resume(state).step == 5
        assert same(state, make_state(0, 5))


@pytest.mark.parametrize("told", [(0,), (2,), (0, 1, 2)])
def test_all_ranks_save_one_step_and_resume_there(told: tuple[int, ...]) -> None:
    place, met = MemoryStorage(), threading.Barrier(3)

    def act(gangs: sc.Gangs) -> int:
        rank = gangs.root.rank
        with sc.CheckpointManager(place, gangs) as checkpoints:
            checkpoints.stop_on(USR1)
            step = 0
            while True:
                step += 1
                met.wait()  # a training step
                if step == 20 and rank in told:
                    checkpoints.request_stop("spot notice")
                stop = checkpoints.should_stop(step)
                if stop or step % 5 == 0:
                    checkpoints.save(step, make_state(rank, step), replicated=("model",))
                if stop:
                    break
        with sc.CheckpointManager(place, gangs) as checkpoints:
            state = blank_state(rank)
            assert checkpoints.resume(state).step == step
            assert same(state, make_state(rank, step))
        return step

    steps = run_ranks(3, act)
    assert len(set(steps)) == 1
    assert steps[0] >= 20


def test_without_a_rank_the_others_end_within_the_budget_and_say_who_is_missing() -> None:
    place, gone = MemoryStorage(), threading.Event()

    def act(gangs: sc.Gangs) -> str:
        rank = gangs.root.rank
        checkpoints = sc.CheckpointManager(place, gangs)
        checkpoints.stop_on(USR1, budget=timedelta(seconds=2))
        if rank == 1:  # without a word
            checkpoints.close()
            gone.set()
            return ""
        gone.wait()
        began = time.monotonic()
        checkpoints.request_stop()
        step = next(step for step in range(1, 10**9) if checkpoints.should_stop(step))
        with pytest.raises(sc.CheckpointSaveError) as caught:
            checkpoints.save(step, make_state(rank, step)).result()
        assert time.monotonic() - began < 8  # the budget, and a second and more by which the others wait longer
        checkpoints.close()
        return str(caught.value)

    told = run_ranks(3, act)
    assert "rank 1 did not come" in told[0]
    assert "rank 1" in told[2]


def test_a_save_under_way_that_takes_too_long_is_cancelled_for_the_last_one() -> None:
    place = MemoryStorage()
    storage = GatedStorage(place, on("put", key="step_1."))
    with local(storage) as checkpoints:
        checkpoints.stop_on(USR1, budget=timedelta(seconds=0.4))
        slow = checkpoints.save(1, {**make_state(0, 1), "model": {"weight": torch.ones(2)}}, replicated=("model",))
        cancel = slow.cancel

        def cancel_and_let_go() -> None:
            cancel()
            storage.open_gate()

        slow.cancel = cancel_and_let_go  # type: ignore[method-assign]
        strike(USR1)
        assert checkpoints.should_stop(2)
        checkpoints.save(2, make_state(0, 2)).result()
        assert isinstance(slow.failure(), sc.CheckpointSaveError)
        assert "cancelled" in str(slow.failure())
        assert checkpoints.steps() == [2]


def test_a_save_under_way_that_ends_in_time_is_let_end() -> None:
    with local(MemoryStorage()) as checkpoints:
        checkpoints.stop_on(USR1)
        earlier = checkpoints.save(1, make_state(0, 1))
        strike(USR1)
        assert checkpoints.should_stop(2)
        assert earlier.done()
        checkpoints.save(2, make_state(0, 2))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_the_last_save_is_not_skipped_for_one_under_way() -> None:
    storage = GatedStorage(MemoryStorage(), on("put", key="rank_0.pt"))
    with local(storage, saving=sc.SavePolicy(when_busy="skip")) as checkpoints:
        checkpoints.stop_on(USR1)
        heard: list[sc.Event] = []
        checkpoints.subscribe(heard.append)
        checkpoints.save(1, make_state(0, 1))
        assert storage.reached.wait(20)
        assert checkpoints.save(2, make_state(0, 2)) is not None  # is skipped
        strike(USR1)
        with _other_thread(storage.open_gate):
            assert checkpoints.should_stop(3)
        checkpoints.save(3, make_state(0, 3))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]
    (agreed,) = [event for event in heard if isinstance(event, sc.StopAgreed)]
    assert (agreed.step, agreed.reason, agreed.absent) == (0, "SIGUSR1", ())
    (skipped,) = [event for event in heard if isinstance(event, sc.SaveSkipped)]
    assert skipped.step == 2
    assert "step 1 is still being saved" in skipped.reason


def test_a_signal_during_a_load_ends_the_first_step() -> None:
    place = MemoryStorage()
    with local(place) as checkpoints:
        checkpoints.save(7, make_state(0, 7)).result()
    storage = GatedStorage(place, on("read_into"))
    with local(storage) as checkpoints:
        checkpoints.stop_on(USR1)
        state = blank_state(0)

        def strike_and_let_go() -> None:
            storage.reached.wait()
            os.kill(os.getpid(), USR1)
            storage.open_gate()

        with _other_thread(strike_and_let_go):
            assert checkpoints.resume(state).step == 7
        assert same(state, make_state(0, 7))
        assert checkpoints.should_stop(8)


def test_handlers_of_the_program_are_called_too_and_put_back() -> None:
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(USR1, own)
    try:
        with local(MemoryStorage()) as checkpoints:
            checkpoints.stop_on(USR1, USR2)
            strike(USR1)
            strike(USR2)
            strike(USR1)
            assert checkpoints.should_stop(1)
        assert seen == [USR1, USR1]
        assert signal.getsignal(USR1) is own
    finally:
        signal.signal(USR1, before)


def test_an_interrupt_from_the_keyboard_ends_softly_and_the_second_one_hard() -> None:
    with local(MemoryStorage()) as checkpoints:
        checkpoints.stop_on(signal.SIGINT)
        strike(signal.SIGINT)
        assert checkpoints.should_stop(1)
        with pytest.raises(KeyboardInterrupt):
            strike(signal.SIGINT)


def test_a_handler_that_took_our_place_is_left_there() -> None:
    watch = SignalWatch([USR1], lambda name: None)
    signal.signal(USR1, signal.SIG_IGN)
    watch.close()
    assert signal.getsignal(USR1) == signal.SIG_IGN
    signal.signal(USR1, signal.SIG_DFL)


def test_only_the_main_thread_watches(caplog: pytest.LogCaptureFixture) -> None:
    with _other_thread(lambda: SignalWatch([USR1], lambda name: None)):
        pass
    assert signal.getsignal(USR1) == signal.SIG_DFL
    assert "only the main thread" in caplog.text


def test_a_signal_that_cannot_be_watched_leaves_no_handler() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        SignalWatch([USR1, signal.SIGKILL], lambda name: None)
    assert signal.getsignal(USR1) == signal.SIG_DFL


def test_a_forked_child_dies_of_the_signal_as_ever() -> None:
    """As workers of a data loader must when they are terminated."""
    code = (
        "import os, signal\n"
        "from shardckpt.manager.signals import SignalWatch\n"
        "watch = SignalWatch([signal.SIGTERM], print)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "status = os.waitpid(child, 0)[1]\n"
        "assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, status\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_turns() -> None:
    with local(MemoryStorage()) as checkpoints:
        assert not checkpoints.should_stop(1)  # a program may ask although nothing was set up
        with pytest.raises(sc.InvalidOperationError, match="stop_on"):
            checkpoints.request_stop()
        checkpoints.stop_on(USR1)
        with pytest.raises(sc.InvalidOperationError, match="before"):
            checkpoints.stop_on(USR1)
        checkpoints.request_stop()
        assert checkpoints.should_stop(2)


class _other_thread:  # noqa: N801
    """Does something in another thread meanwhile."""

    def __init__(self, act: Any) -> None:
        self._thread = threading.Thread(target=act)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *raised: object) -> None:
        self._thread.join()
