"""A gang of which rank 0 hears few: it is as one of which it hears all, whoever fails on the way."""

from __future__ import annotations

import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.gang import StoreGang, together
from shardckpt.gang.wire import mailbox, messages, tree
from shardckpt.gang.wire.roll import Roll
from shardckpt.gang.wire.tree import Gathering
from shardckpt.testing.gang_acts import ENOUGH_S, LONG, SHORT, go_on, refusal
from shardckpt.testing.gang_suite import Play, TeamContract
from shardckpt.testing.gangs import RanksError, run_threads
from tests.gang.conftest import client
from tests.gang.test_store import DeafStore


def in_threads(store_of: Any, *, size: int, flat: int) -> Play:
    nonce = uuid.uuid4().hex

    def play(act: Any, *args: Any) -> list[Any]:
        def on_rank(rank: int) -> Any:
            gang = StoreGang(lambda: store_of(rank), rank=rank, size=size, nonce=nonce, flat=flat)
            try:
                return act(gang, *args)
            finally:
                gang.close()

        settled = run_threads(size, on_rank)
        errors = {rank: outcome for rank, outcome in enumerate(settled) if isinstance(outcome, BaseException)}
        if errors:
            raise RanksError(errors)
        return settled

    return play


class TestTreeOnHashStore(TeamContract):
    """Of four ranks: 0 and 1, 2 and 3."""

    @pytest.fixture
    def play(self) -> Play:
        store = dist.HashStore()
        return in_threads(lambda rank: store, size=4, flat=2)


class TestTreeOnTcpStore(TeamContract):
    @pytest.fixture
    def play(self, port: int) -> Play:
        return in_threads(lambda rank: client(port, rank), size=4, flat=2)


MACHINES = 9
"""Ranks of the gangs below: 0-2, 3-5, 6-8 are groups, and each group is a machine of its own."""


class Died(BaseException):
    """Ends a thread that stands for a process that is killed."""


class Machine(Roll):
    """What the ranks of one machine can see: which of its own have ended."""

    def __init__(self, own: range, dead: set[int]) -> None:
        super().__init__("", ())
        self._own, self._dead = own, dead

    def ended(self, ranks: Iterable[int]) -> set[int]:
        return {rank for rank in ranks if rank in self._own and rank in self._dead}


def on_machines(act: Callable[[StoreGang], Any], victim: int) -> list[Any]:
    """What `act` returns on each rank; the victim raises `Died`, after which its machine knows it to have ended."""
    store: Any = dist.HashStore()
    dead, nonce = set[int](), uuid.uuid4().hex

    def on_rank(rank: int) -> Any:
        first = rank - rank % 3
        roll = Machine(range(first, first + 3), dead)
        gang = StoreGang(lambda: store, rank=rank, size=MACHINES, nonce=nonce, flat=2, roll=roll)
        try:
            gang.enter("before", timeout=LONG)
            return act(gang)
        except Died:
            dead.add(rank)
            return None
        finally:
            gang.close()

    settled = run_threads(MACHINES, on_rank)
    errors = {rank: outcome for rank, outcome in enumerate(settled) if isinstance(outcome, BaseException)}
    assert not errors, RanksError(errors)
    return [outcome for rank, outcome in enumerate(settled) if rank != victim]


@pytest.mark.parametrize("victim", [1, 3, 4, 8, 0])
def test_a_death_is_noticed_wherever_it_can_be_seen(victim: int) -> None:
    """In the group of rank 0, the first of another, the last of one, alone; and rank 0 itself, seen by its group."""

    def act(gang: StoreGang) -> Any:
        if gang.rank == victim:
            raise Died
        return refusal(lambda: together(gang, lambda: None, phase="write", timeout=LONG))

    errors = on_machines(act, victim)
    for error in errors:
        assert error["absent"] == (victim,)
        assert error["took_s"] < ENOUGH_S, "the timeout is longer"
    assert victim == 0 or len({error["text"] for error in errors}) == 1


@pytest.mark.parametrize("victim", [1, 3, 4])
def test_a_death_after_the_vote_does_not_change_the_vote(victim: int) -> None:
    def act(gang: StoreGang) -> Any:
        values = gang.gather(gang.rank, timeout=LONG)
        if gang.rank == victim:
            raise Died
        told = gang.broadcast(values, timeout=LONG)
        return told, refusal(lambda: together(gang, lambda: None, phase="next", timeout=LONG))

    for told, error in on_machines(act, victim):
        assert told == list(range(MACHINES))
        assert error["absent"] == (victim,)
        assert error["took_s"] < ENOUGH_S


@pytest.mark.parametrize("late", [False, True])
def test_what_a_group_has_given_is_read_if_its_first_dies_before_it_hands_it_on(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """`late`: one of them gives its value only after that."""
    died, wait = threading.Event(), Gathering._await

    def die_at_the_bell(self: Gathering, key: str, *args: Any, **options: Any) -> None:
        if key.endswith("bell/3") and self._rank == 3 and armed.is_set():
            died.set()
            raise Died
        wait(self, key, *args, **options)

    armed = threading.Event()
    monkeypatch.setattr(Gathering, "_await", die_at_the_bell)

    def act(gang: StoreGang) -> Any:
        armed.set()
        if gang.rank == 4 and late:
            assert died.wait(LONG.total_seconds())
            threading.Event().wait(0.5)  # rank 0 has looked meanwhile
        began = time.monotonic()
        values = gang.gather(gang.rank, timeout=LONG)
        told = gang.broadcast(values, timeout=LONG)
        return told, time.monotonic() - began

    for told, took_s in on_machines(act, 3):
        assert told == list(range(MACHINES))
        assert took_s < ENOUGH_S


@pytest.mark.parametrize("victim", [1, 3, 4, 8])
def test_a_rank_that_dies_between_its_value_and_the_count_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """What it has given counts. Nobody rings the bell of those who wait, for one is missing in the count."""
    armed, count = threading.Event(), Gathering._count

    def die(self: Gathering, first: int) -> None:
        if self._rank == victim and armed.is_set():
            raise Died
        count(self, first)

    monkeypatch.setattr(Gathering, "_count", die)

    def act(gang: StoreGang) -> Any:
        armed.set()
        began = time.monotonic()
        told = gang.broadcast(gang.gather(gang.rank, timeout=LONG), timeout=LONG)
        return told, time.monotonic() - began

    for told, took_s in on_machines(act, victim):
        assert told == list(range(MACHINES))
        assert took_s < ENOUGH_S


def test_of_two_that_end_at_once_rank_0_is_told_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 4 gives nothing, rank 8 its value. Who tells of 8 does so after who tells of 4, and before rank 0 looks."""
    armed, told = threading.Event(), {4: threading.Event(), 8: threading.Event()}
    count, tell, wait = Gathering._count, Gathering._tell_of, Gathering._wait

    def die(self: Gathering, first: int) -> None:
        if self._rank == 8 and armed.is_set():
            raise Died
        count(self, first)

    def in_turn(self: Gathering, ended: Any) -> None:
        if 8 in ended:
            assert told[4].wait(LONG.total_seconds())
        tell(self, ended)
        told[4 if 4 in ended else 8].set()

    def late(self: Gathering, passed: Any) -> set[int]:
        if armed.is_set():
            assert told[8].wait(LONG.total_seconds())
        return wait(self, passed)

    for name, act in (("_count", die), ("_tell_of", in_turn), ("_wait", late)):
        monkeypatch.setattr(Gathering, name, act)

    def write(gang: StoreGang) -> Any:
        armed.set()
        if gang.rank == 4:
            raise Died
        return refusal(lambda: together(gang, lambda: None, phase="write", timeout=LONG))

    errors = [error for error in on_machines(write, 4) if error is not None]
    assert len(errors) == MACHINES - 2
    assert all(error["absent"] == (4,) and error["took_s"] < ENOUGH_S for error in errors)


def test_a_store_that_is_slow_has_all_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what is read after a deadline may take: thousands of ranks may ask it at once."""
    monkeypatch.setattr(tree, "_READ_S", 0.0)
    monkeypatch.setattr(mailbox, "_SLACK_S", 0.05)
    store, nonce = Slow(dist.HashStore()), uuid.uuid4().hex

    def act(rank: int) -> Any:
        gang = StoreGang(lambda: store, rank=rank, size=4, nonce=nonce, flat=2)  # type: ignore[arg-type,return-value]
        try:
            gang.enter("scope", timeout=LONG)
            return gang.broadcast(gang.gather(rank, timeout=LONG), timeout=LONG)
        finally:
            gang.close()

    assert run_threads(4, act) == [[0, 1, 2, 3]] * 4


class Slow:
    """A store that takes its time to give many values."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if name == "multi_get":
            threading.Event().wait(0.15)
        return getattr(self._store, name)


@pytest.mark.parametrize("nbytes", [3000, pytest.param(10 << 20, marks=pytest.mark.larger)])
def test_what_is_too_long_together_is_read_one_by_one(monkeypatch: pytest.MonkeyPatch, port: int, nbytes: int) -> None:
    """Digits that cannot be packed well. The longer ones meet the true limit of the store."""
    if nbytes < messages.LONGEST:
        monkeypatch.setattr(messages, "LONGEST", nbytes)
    values = [random.Random(rank).randbytes(nbytes // 2).hex() for rank in range(4)]

    def act(gang: StoreGang) -> Any:
        gang.enter("scope", timeout=LONG)
        heard = gang.gather(values[gang.rank], timeout=LONG)
        return gang.broadcast(heard == values, timeout=LONG)

    assert in_threads(lambda rank: client(port, rank), size=4, flat=2)(act) == [True] * 4


def test_one_that_is_too_long_by_itself_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LONGEST", 1000)
    digits, store = random.Random(0).randbytes(1500).hex(), dist.HashStore()

    def act(gang: StoreGang) -> Any:
        gang.enter("scope", timeout=LONG)
        if gang.rank:
            return refusal(lambda: gang.gather(digits, timeout=LONG))
        return refusal(lambda: gang.broadcast(digits, timeout=LONG))

    for said in in_threads(lambda rank: store, size=2, flat=2)(act):
        assert re.fullmatch(r"gang 'root': a message of \d{4} bytes, packed; a store takes 1000", said["text"])


def test_rank_0_hears_few_and_what_is_folded_is_short() -> None:
    size, nonce = 60, uuid.uuid4().hex
    store: Any = dist.HashStore()
    counted: Any = Counted(store)

    def on_rank(rank: int) -> Any:
        gang = StoreGang(lambda: store if rank else counted, rank=rank, size=size, nonce=nonce, flat=8)
        try:
            gang.enter("scope", timeout=LONG)
            counted.reset(rank)
            plain = gang.gather(rank, timeout=LONG)
            gang.broadcast(None, timeout=LONG)
            counted.note("plain", rank)
            folded = gang.gather({"all": rank}, timeout=LONG, fold=total)
            gang.broadcast(None, timeout=LONG)
            counted.note("folded", rank)
            return plain, folded
        finally:
            gang.close()

    outcomes: list[Any] = run_threads(size, on_rank)
    errors = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}
    assert not errors, RanksError(errors)
    plain, folded = outcomes[0]
    assert plain == list(range(size))
    assert total(folded) == {"all": sum(range(size))}
    assert len(folded) == 7 + 1 + 7, "eight ranks in a group: those of the first, and one for each other"
    assert counted.values["plain"] == counted.values["folded"] <= 3 * 8
    assert max(counted.calls.values()) <= 16


def total(parts: Sequence[Any]) -> Any:
    return {"all": sum(part["all"] for part in parts)}


class Counted:
    """The store as rank 0 uses it: how many requests, and how many values it reads."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._now = [0, 0]
        self.values, self.calls = dict[str, int](), dict[str, int]()

    def reset(self, rank: int) -> None:
        if rank == 0:
            self._now = [0, 0]

    def note(self, what: str, rank: int) -> None:
        if rank == 0:
            (self.calls[what], self.values[what]), self._now = self._now, [0, 0]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self._now[0] += 1
            self._now[1] += {"multi_get": lambda keys: len(keys), "get": lambda key: 1}.get(name, lambda *_: 0)(*args)
            return getattr(self._store, name)(*args)

        return call


@pytest.mark.parametrize("stuck", [0, 2, 3])
def test_a_store_that_never_answers_one_rank_of_a_tree(stuck: int) -> None:
    """Rank 0, the first of the other group, and the other one of it."""
    store, deaf, released = dist.HashStore(), threading.Event(), threading.Event()
    nonce = uuid.uuid4().hex

    def act(rank: int) -> Any:
        client: Any = DeafStore(store, deaf, released) if rank == stuck else store
        gang = StoreGang(lambda: client, rank=rank, size=4, nonce=nonce, flat=2)
        try:
            gang.enter("before", timeout=LONG)
            if rank == stuck:
                deaf.set()
            error = refusal(lambda: together(gang, lambda: None, phase="write", timeout=SHORT))
            if rank == stuck:
                deaf.clear()
            return error, go_on(gang)
        finally:
            gang.close()

    results = run_threads(4, act)
    released.set()  # the kernel gives up at last: the abandoned threads end
    assert not [result for result in results if isinstance(result, BaseException)]
    errors = [result[0] for result in results if not isinstance(result, BaseException)]
    assert all(error["took_s"] < ENOUGH_S for error in errors)
    assert all(error["absent"] == (stuck,) for rank, error in enumerate(errors) if rank != stuck)
