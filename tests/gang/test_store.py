"""What only a gang over a store has to prove: stores that hang, break or fill up, and keys of other times."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.errors import GangError
from shardckpt.gang import StoreGang, together
from shardckpt.gang.wire.mailbox import SilentError, Watchdog
from shardckpt.gang.wire.nonce import agree_on_nonce
from shardckpt.testing.gang_acts import ENOUGH_S, LONG, SHORT, go_on, refusal
from shardckpt.testing.gangs import run_threads


class DeafStore:
    """A client whose calls never come back while `deaf` is set, as on a connection whose packets are dropped."""

    def __init__(self, store: Any, deaf: threading.Event, released: threading.Event) -> None:
        self._store = store
        self._deaf = deaf
        self._released = released

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self._deaf.is_set():
                self._released.wait()
                raise RuntimeError("released at the end of the test")
            return getattr(self._store, name)(*args)

        return call


class BrokenStore:
    """A client whose connection was reset."""

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("Connection reset by peer")

        return call


def gangs_over(store: Any, size: int) -> list[StoreGang]:
    return [StoreGang(lambda: store, rank=rank, size=size, nonce="test") for rank in range(size)]


def close(gangs: list[StoreGang]) -> None:
    for gang in gangs:
        gang.close()


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_store_that_never_answers_ends_in_an_error_and_the_next_scope_is_well(stuck: int) -> None:
    store, deaf, released = dist.HashStore(), threading.Event(), threading.Event()
    gangs = gangs_over(store, 3)
    gangs[stuck] = StoreGang(lambda: DeafStore(store, deaf, released), rank=stuck, size=3, nonce="test")

    def act(rank: int) -> Any:
        gang = gangs[rank]
        gang.enter("before", timeout=LONG)
        if rank == stuck:
            deaf.set()
        error = refusal(lambda: together(gang, lambda: None, phase="write", timeout=SHORT))
        if rank == stuck:
            deaf.clear()
        return error, go_on(gang)

    results = run_threads(3, act)
    close(gangs)
    released.set()  # the kernel gives up at last: the abandoned threads end
    errors = [result[0] for result in results if not isinstance(result, BaseException)]
    assert len(errors) == 3, results
    assert all(error["took_s"] < ENOUGH_S for error in errors)
    assert "did not answer" in errors[stuck]["text"]
    assert all(error["absent"] == (stuck,) for rank, error in enumerate(errors) if rank != stuck)


def test_a_store_that_is_gone_is_an_error_at_once_and_a_new_client_is_made() -> None:
    store: Any = dist.HashStore()
    clients: list[Any] = [BrokenStore(), store]
    gang = StoreGang(lambda: clients.pop(0), rank=0, size=1, nonce="test")
    with pytest.raises(GangError, match="Connection reset by peer"):
        gang.enter("first", timeout=LONG)
    gang.enter("second", timeout=LONG)
    assert clients == []
    gang.close()


def test_the_watchdog_ends_its_thread_and_makes_a_new_client_only_after_a_failure() -> None:
    made: list[int] = []
    released = threading.Event()

    def make() -> int:
        made.append(len(made))
        return made[-1]

    watchdog = Watchdog(make, name="watched")
    assert [watchdog.call(lambda client: client, within_s=10) for _ in range(3)] == [0, 0, 0]
    began = time.monotonic()
    with pytest.raises(SilentError):
        watchdog.call(lambda _: released.wait(), within_s=0.05)
    with pytest.raises(SilentError):
        watchdog.call(lambda client: client, within_s=10)
    assert time.monotonic() - began < 5, "the second one did not even try"
    watchdog.renew()
    assert watchdog.call(lambda client: client, within_s=10) == 1
    with pytest.raises(ZeroDivisionError):
        watchdog.call(lambda client: client // 0, within_s=10)
    watchdog.close()
    released.set()


def new_hash_store() -> Any:
    return dist.HashStore()


def test_a_gang_that_is_dropped_without_close_leaves_no_thread() -> None:
    gang = StoreGang(new_hash_store, rank=0, size=1, nonce="test")
    gang.enter("only", timeout=LONG)
    thread = next(thread for thread in threading.enumerate() if thread.name == "shardckpt-root-0")
    del gang
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_store_does_not_grow() -> None:
    store: Any = dist.HashStore()
    gangs = gangs_over(store, 4)
    all_here = threading.Barrier(4)
    counts: list[int] = []

    def converse(rank: int) -> None:
        for scope in range(30):
            gangs[rank].enter(f"scope {scope}", timeout=LONG)
            for _ in range(5):
                gangs[rank].gather(rank, timeout=LONG)
                gangs[rank].broadcast(rank, timeout=LONG)
            all_here.wait(60)
            if rank == 0:
                counts.append(store.num_keys())
            all_here.wait(60)

    assert run_threads(4, converse) == [None] * 4
    close(gangs)
    assert max(counts) <= counts[0] + 4 * 4, counts
    assert counts[-1] <= counts[0] + 4 * 4, counts


def test_failed_meetings_are_cleared_away_by_the_next_that_succeeds() -> None:
    store: Any = dist.HashStore()
    gangs = gangs_over(store, 2)
    after: list[int] = []
    for _ in range(3):
        for number in range(3):
            with pytest.raises(GangError):
                gangs[0].enter(f"alone {number}", timeout=timedelta(milliseconds=20))

        def meet(rank: int) -> None:
            for scope in ("a", "b"):
                gangs[rank].enter(scope, timeout=LONG)
                gangs[rank].gather(rank, timeout=LONG)
                gangs[rank].broadcast(rank, timeout=LONG)

        assert run_threads(2, meet) == [None, None]
        after.append(store.num_keys())
    close(gangs)
    assert max(after) <= after[0] + 4, after


def test_a_value_given_too_late_is_not_taken_for_one_of_the_next_conversation() -> None:
    gangs = gangs_over(dist.HashStore(), 2)
    given, over = threading.Event(), threading.Event()

    def act(rank: int) -> Any:
        gang = gangs[rank]
        gang.enter("same name", timeout=LONG)
        if rank == 0:
            with pytest.raises(GangError):
                gang.gather("own", timeout=timedelta(milliseconds=50))
            over.set()
            assert given.wait(30)
        else:
            assert over.wait(30)
            gang.gather("stale", timeout=LONG)
            given.set()
        gang.enter("same name", timeout=LONG)
        return gang.gather("fresh", timeout=LONG)

    assert run_threads(2, act) == [["fresh", "fresh"], None]
    close(gangs)


def test_a_call_that_seemed_to_fail_but_was_heard_does_not_put_the_ranks_out_of_step() -> None:
    """Rank 0's connection breaks after its call has reached the store: the others have heard it and count on."""
    store: Any = dist.HashStore()
    broken = threading.Event()

    class BreaksAfterSet:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def set(self, key: str, value: str) -> None:
            store.set(key, value)
            if "/call/" in key and not broken.is_set():
                broken.set()
                raise RuntimeError("Connection reset by peer")

    gangs = [StoreGang(BreaksAfterSet, rank=0, size=2, nonce="test"), *gangs_over(store, 2)[1:]]

    def act(rank: int) -> Any:
        error = refusal(lambda: gangs[rank].enter("first", timeout=SHORT))
        assert error
        return go_on(gangs[rank])

    assert run_threads(2, act) == [["next", 2]] * 2
    close(gangs)


def test_a_nonce_is_never_that_of_an_earlier_generation_on_the_same_store() -> None:
    """torchelastic gives restarted workers the store of the old ones; some start before the new rank 0 does."""
    store: Any = dist.HashStore()
    nonces = []
    for generation in range(3):
        begun = [threading.Event() for _ in range(3)]

        def agree(rank: int) -> str:
            if rank == 0:  # the last to come: the others find what the generation before has left
                assert all(event.wait(30) for event in begun[1:])  # noqa: B023 (called in this round)
            begun[rank].set()  # noqa: B023
            label = f"run-{generation}"  # noqa: B023
            return agree_on_nonce(lambda: store, place="start", rank=rank, size=3, label=label, timeout=LONG)

        agreed = run_threads(3, agree)
        assert len(set(map(str, agreed))) == 1, agreed
        assert str(agreed[0]).startswith(f"run-{generation}-")
        nonces.append(agreed[0])
    assert len(set(nonces)) == 3


def test_ranks_that_do_not_start_are_named() -> None:
    store: Any = dist.HashStore()

    def agree(rank: int) -> Any:
        if rank == 2:
            return None
        return refusal(
            lambda: agree_on_nonce(lambda: store, place="start", rank=rank, size=3, label="run", timeout=SHORT)
        )

    for error in run_threads(3, agree)[:2]:
        assert isinstance(error, dict)
        assert error["absent"] == (2,)
