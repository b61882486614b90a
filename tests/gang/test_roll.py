"""A process that has ended is known to have; one of which nothing is known is not said to have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.errors import GangError
from shardckpt.gang import Gangs, StoreGang, together
from shardckpt.gang.wire import mailbox
from shardckpt.gang.wire import roll as roll_module
from shardckpt.gang.wire.roll import UNKNOWN, Roll, has_ended, neighbours, own_process
from shardckpt.testing.gang_acts import ENOUGH_S, LONG, await_marks, go_on, mark, refusal
from shardckpt.testing.gangs import run_ranks
from shardckpt.testing.pool import Outcome, ProcessPool, RankLostError


@pytest.fixture
def process() -> Any:
    made = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield made
    made.kill()
    made.communicate()


def known(pid: int) -> Any:
    own: Any = own_process()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return [*own[:2], pid, started]


def test_it_lives_and_then_has_ended(process: Any) -> None:
    own, other = own_process(), known(process.pid)
    assert not has_ended(own, own=own)
    assert not has_ended(other, own=own)
    process.send_signal(signal.SIGSTOP)
    assert not has_ended(other, own=own), "it may go on"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(other, own=own), "nobody has asked yet how it ended"
    process.wait()
    assert has_ended(other, own=own)


def test_another_process_that_got_its_number() -> None:
    own: Any = own_process()
    assert has_ended([*own[:3], "1"], own=own)


def test_of_what_cannot_be_known_nothing_is_said(process: Any) -> None:
    own, other = own_process(), known(process.pid)
    process.kill()
    process.wait()
    assert not has_ended(["another machine", *other[1:]], own=own)
    assert not has_ended([other[0], "pid:[1]", *other[2:]], own=own)
    assert not has_ended(None, own=own)
    assert not has_ended(other, own=None)
    assert UNKNOWN.of([0]).ended([0, 1]) == set()


def test_neighbours() -> None:
    assert neighbours(0, 3) == [1, 2]
    assert neighbours(2, 3) == [0, 1]
    assert neighbours(100, 4096) == [0, *range(84, 100), *range(101, 117)]


def test_a_store_that_is_slow_to_reach_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the deadline, also where nothing but who the ranks are is asked."""
    monkeypatch.setattr(roll_module, "_WORTH_S", 0.01)
    monkeypatch.setattr(mailbox, "_SLACK_S", 0.01)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]

    def slowly() -> Any:
        time.sleep(0.2)  # many times as long as both together
        return store

    def act(gangs: Gangs) -> Any:
        own = StoreGang(slowly, rank=gangs.root.rank, size=2, nonce="n", roll=Roll("who", (0, 1)))
        try:
            return go_on(own)
        finally:
            own.close()

    assert run_ranks(2, act) == [["next", 2]] * 2


def test_a_value_that_was_given_before_the_end_is_taken(process: Any) -> None:
    """Rank 1 has given its value and ended; rank 2 is only late, and is waited for."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    roll = Roll("who", (0, 1, 2), {0: own_process(), 1: known(process.pid), 2: own_process()})
    gang = StoreGang(lambda: store, rank=0, size=3, nonce="n", roll=roll)
    process.kill()
    process.wait()
    store.set("shardckpt/n/c/1/1", '"given"')
    gang._conversation = "c"
    try:
        with pytest.raises(GangError, match="rank 2 did not answer") as caught:
            gang.gather("own", timeout=timedelta(seconds=2))
        assert caught.value.absent == (2,)
        assert "killed" not in str(caught.value)
    finally:
        gang.close()


def die_at_leisure(rank: int, size: int, folder: Path, victim: int) -> Any:
    """Between two conversations, when nobody listens."""
    gangs = Gangs.from_env()
    try:
        gangs.root.enter("before", timeout=LONG)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(GangError) as caught:
            gangs.root.enter("after", timeout=LONG)
        return {"absent": caught.value.absent, "text": str(caught.value), "took_s": time.monotonic() - began}
    finally:
        gangs.close()


def assert_noticed(outcomes: list[Outcome], victim: int) -> None:
    """The others name the one that was killed, long before the timeout."""
    assert isinstance(outcomes[victim].error, RankLostError)
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None, str(outcome)
            assert outcome.value["absent"] == (victim,)
            assert outcome.value["took_s"] < ENOUGH_S, "the timeout is longer"


@pytest.mark.crash
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_between_two_conversations(ranks: ProcessPool, victim: int) -> None:
    outcomes = ranks.run_settled(3, die_at_leisure, victim)
    assert isinstance(outcomes[victim].error, RankLostError)
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None, str(outcome)
            assert outcome.value["absent"] == (victim,)
            assert f"rank {victim} was killed, or has ended" in outcome.value["text"]
            assert outcome.value["took_s"] < ENOUGH_S, "the timeout is longer"


def die_and_leave_a_child(rank: int, size: int, folder: Path, victim: int) -> Any:
    """The child has the victim's connections, as the workers of a data loader do, and lives on for a while."""
    gangs = Gangs.from_env()

    def work() -> None:
        if rank == victim:
            if not os.fork():
                with suppress(BaseException):
                    await_marks(folder, "raised", size - 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        gangs.root.enter("work", timeout=LONG)
        return refusal(lambda: together(gangs.root, work, phase="write", timeout=LONG))
    finally:
        mark(folder, "raised", rank)
        gangs.close()


@pytest.mark.crash
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_is_noticed_though_a_child_holds_the_connections(ranks: ProcessPool, victim: int) -> None:
    outcomes = ranks.run_settled(3, die_and_leave_a_child, victim)
    assert_noticed(outcomes, victim)


def die_in_a_tree(rank: int, size: int, folder: Path, victim: int) -> Any:
    """In the groups 0-2 and 3-4: while the others wait for its value."""
    gangs = Gangs.from_env()
    known: Any = gangs.root
    tree = StoreGang(known._make_store, rank=rank, size=size, nonce="tree", roll=known._meeting.roll, flat=2)

    def work() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        tree.enter("work", timeout=LONG)
        return refusal(lambda: together(tree, work, phase="write", timeout=LONG))
    finally:
        tree.close()
        gangs.close()


@pytest.mark.crash
@pytest.mark.parametrize("victim", [0, 3, 4])
def test_a_kill_is_noticed_wherever_in_a_tree(ranks: ProcessPool, victim: int) -> None:
    outcomes = ranks.run_settled(5, die_in_a_tree, victim)
    assert_noticed(outcomes, victim)
