"""All ranks stop at one common step, whoever was told to, however far apart they are, and whoever is missing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.gang.halt import Decision, Halt
from shardckpt.gang.local import LocalGang
from shardckpt.gang.store import StoreGang
from shardckpt.testing.gangs import run_threads

RANKS = 3
PATIENT, SHORT = timedelta(seconds=20), timedelta(seconds=0.5)


def on_ranks(act: Callable[[Halt, int], Any], *, patience: timedelta = PATIENT) -> list[Any]:
    store: Any = dist.HashStore()

    def run(rank: int) -> Any:
        halt = Halt(StoreGang(lambda: store, rank=rank, size=RANKS, nonce="halt"), patience=patience)
        try:
            return act(halt, rank)
        finally:
            halt.close()

    settled = run_threads(RANKS, run)
    for outcome in settled:
        if isinstance(outcome, BaseException):
            raise outcome
    return settled


def first_yes(halt: Halt, first: int) -> int:
    return next(step for step in itertools.count(first) if halt.ask(step))


def once_told(halt: Halt, first: int) -> int:
    """The same, by a rank that is known to have been asked how far it is."""
    while not (halt._agreeing or halt.decision):
        time.sleep(0)
    return first_yes(halt, first)


@pytest.mark.parametrize("stride", [1, 7])
@pytest.mark.parametrize("told", [(0,), (1,), (2,), (0, 1, 2)])
def test_ranks_that_run_apart_stop_at_one_step(told: tuple[int, ...], stride: int) -> None:
    """Nothing but the stop holds them together."""
    over = threading.Barrier(RANKS)

    def act(halt: Halt, rank: int) -> tuple[int, Any]:
        step = 0
        while not halt.ask(step := step + stride):
            if step == 50 * stride and rank in told:
                halt.request(f"rank {rank} was told")
            time.sleep(0)  # or the others get no turn
        assert halt.ask(step)
        assert not halt.ask(step - stride)
        over.wait()
        return step, halt.decision

    stops = on_ranks(act)
    assert len(set(stops)) == 1, stops
    step, decision = stops[0]
    assert 0 <= step - decision.step < stride
    assert decision.absent == ()
    assert decision.reason in {f"rank {rank} was told" for rank in told}


def test_a_rank_that_is_far_ahead_decides_where_it_is() -> None:
    ahead, over = threading.Event(), threading.Barrier(RANKS)

    def act(halt: Halt, rank: int) -> int:
        if rank == 1:
            assert not any(halt.ask(step) for step in range(1, 1001))
            ahead.set()
        else:
            ahead.wait()
            halt.request("now")
        step = once_told(halt, 1)
        over.wait()
        return step

    assert on_ranks(act) == [1001] * RANKS


def test_a_rank_that_trains_elsewhere_holds_nobody_up() -> None:
    """It answers with another thread: the others have their decision while it still waits, as in a collective."""
    others, over = threading.Barrier(RANKS), threading.Barrier(RANKS)

    def act(halt: Halt, rank: int) -> int:
        assert not halt.ask(1)
        if rank == 2:
            others.wait()  # until both others have stopped
            step = once_told(halt, 2)
        else:
            halt.request("now")
            step = once_told(halt, 2)
            others.wait()
        over.wait()
        return step

    assert on_ranks(act) == [2] * RANKS


def test_before_any_step_the_first_one_is_the_last() -> None:
    """As during a load: nobody has asked yet."""
    over = threading.Barrier(RANKS)

    def act(halt: Halt, rank: int) -> int:
        if rank == 2:
            halt.request("now")
        step = once_told(halt, 101)
        over.wait()
        return step

    assert on_ranks(act) == [101] * RANKS


def test_a_rank_that_is_gone_is_named_and_the_others_stop_together() -> None:
    over, gone = threading.Barrier(2), threading.Event()

    def act(halt: Halt, rank: int) -> Decision | None:
        if rank == 1:
            halt.close()
            gone.set()
            return None
        assert gone.wait(20)
        assert not halt.ask(1)
        halt.request("now")
        assert once_told(halt, 2) == 2
        over.wait()
        return halt.decision

    zero, one, two = on_ranks(act, patience=SHORT)
    assert one is None
    assert zero == two
    assert zero.absent == (1,)


def test_without_rank_0_the_others_stop_all_the_same() -> None:
    over, gone = threading.Barrier(2), threading.Event()

    def act(halt: Halt, rank: int) -> Decision | None:
        if rank == 0:
            halt.close()
            gone.set()
            return None
        assert gone.wait(20)
        assert not halt.ask(1)
        halt.request("now")
        assert once_told(halt, 2)
        over.wait()
        return halt.decision

    zero, one, two = on_ranks(act, patience=SHORT)
    assert zero is None
    assert 0 in one.absent
    assert 0 in two.absent


def test_a_store_that_is_gone_lets_nobody_wait() -> None:
    def broken() -> Any:
        raise RuntimeError("no such store")

    halt = Halt(StoreGang(broken, rank=1, size=RANKS, nonce="halt"), patience=SHORT)
    assert not halt.ask(1)
    halt.request("now")
    assert once_told(halt, 2)
    assert halt.decision is not None
    assert halt.decision.absent == (0, 2)
    halt.close()


def test_one_process_needs_nobody() -> None:
    halt = Halt(LocalGang(), patience=PATIENT)
    assert not halt.ask(1)
    halt.request("now")
    halt.request("again")
    assert not halt.ask(1)
    assert halt.ask(2)
    assert halt.ask(3)
    assert halt.decision == Decision(2, "now")
    halt.close()


def test_a_failing_subscriber_stops_nobody() -> None:
    def fail(decision: Decision) -> None:
        raise ValueError("not mine")

    halt = Halt(LocalGang(), patience=PATIENT, on_decision=fail)
    halt.request("now")
    assert halt.ask(1)
