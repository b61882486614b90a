"""How fast objects are deleted: by a clock that only moves when somebody sleeps, and on a server that asks for less."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import fsspec
import pytest

import shardckpt.storage.filesystem as filesystem
from shardckpt.storage.filesystem import FsspecStorage
from shardckpt.storage.open import open_storage
from shardckpt.storage.transfer.amounts import Transfers
from shardckpt.storage.transfer.deleting import DeletePace
from tests.storage import proxy, s3server
from tests.storage.test_pacing import Clock, use


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return use(monkeypatch)


class Deleted:
    """In the place of a back end's request: when, and how many."""

    def __init__(self, clock: Clock, *, refuse: int = 0) -> None:
        self._clock, self._refuse = clock, refuse
        self._lock = threading.Lock()
        self.requests: list[tuple[float, int]] = []

    def __call__(self, fs: Any, paths: Sequence[str]) -> None:
        with self._lock:
            self.requests.append((self._clock.now, len(paths)))
            self._refuse -= 1
            if self._refuse >= 0:
                raise OSError(errno.EBUSY, "Please reduce your request rate.")


def storage(monkeypatch: pytest.MonkeyPatch, deleted: Deleted, limit: float | None) -> FsspecStorage:
    monkeypatch.setattr(FsspecStorage, "_delete_objects", staticmethod(deleted))
    monkeypatch.setattr(filesystem, "Retrier", lambda policy: Unwaiting())
    return FsspecStorage(fsspec.filesystem("memory"), "/deleting", transfers=Transfers(deletes_per_second=limit))


class Unwaiting:
    """Tries again at once."""

    retries = 0

    def call(self, work: Callable[[], Any], *, what: str) -> Any:
        for _ in range(8):
            try:
                return work()
            except OSError as error:
                last = error
        raise last


def test_without_a_limit_a_thousand_go_in_each_request_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    deleted = Deleted(clock)
    storage(monkeypatch, deleted, None).delete(f"k{i}" for i in range(2500))
    assert deleted.requests == [(1000.0, 1000), (1000.0, 1000), (1000.0, 500)]


@pytest.mark.parametrize("limit", [50.0, 400.0, 3000.0])
def test_all_threads_together_keep_to_the_limit(monkeypatch: pytest.MonkeyPatch, clock: Clock, limit: float) -> None:
    deleted = Deleted(clock)
    place = storage(monkeypatch, deleted, limit)
    threads = [threading.Thread(target=place.delete, args=([f"{t}/k{i}" for i in range(1500)],)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count for _, count in deleted.requests) == 6000
    assert max(count for _, count in deleted.requests) <= min(1000, limit)
    # By this clock each sleeps alone, so it has run at least as long as one after the other would take.
    assert clock.now - 1000.0 >= (6000 - 4 * min(1000, limit)) / limit


def test_a_place_that_asks_for_less_gets_half_and_then_step_by_step_more(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    pace, refusing = DeletePace(800), Deleted(clock, refuse=3)
    rates = []
    for _ in range(3):
        with pytest.raises(OSError, match="reduce your request rate"):
            pace.request(refusing, None, paths=["k"])
        rates.append(pace.rate)
    assert rates == [400, 200, 100]
    for _ in range(12):
        pace.request(refusing, None, paths=["k"])
        rates.append(pace.rate)
    assert rates[3:] == sorted(rates[3:])
    assert rates[3] == 125
    assert rates[-1] == 800, "never more than the limit"


def test_where_there_was_no_limit_there_is_one_until_the_place_bears_more(clock: Clock) -> None:
    pace, refusing = DeletePace(None), Deleted(clock, refuse=20)
    for _ in range(20):
        with pytest.raises(OSError, match="reduce your request rate"):
            pace.request(refusing, None, paths=["k"])
    assert pace.rate == 10, "never so slow that nothing comes to an end"
    for _ in range(60):
        pace.request(refusing, None, paths=["k"])
    assert pace.rate == float("inf")


def test_other_errors_slow_nothing_down(clock: Clock) -> None:
    pace = DeletePace(800)

    def fail(fs: Any, paths: Sequence[str]) -> None:
        raise PermissionError("not yours")

    with pytest.raises(PermissionError):
        pace.request(fail, None, paths=["k"])
    assert pace.rate == 800


def test_a_refused_request_is_made_again_and_counts_again(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    deleted = Deleted(clock, refuse=2)
    storage(monkeypatch, deleted, 100).delete(f"k{i}" for i in range(100))
    assert [count for _, count in deleted.requests] == [100, 100, 100]
    first, second, third = (when for when, _ in deleted.requests)
    assert second - first > 0.89
    assert third - second > 0.89


@pytest.mark.parametrize("given", [0, -3, "fast", float("nan"), True])
def test_what_is_no_rate_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="deletes_per_second"):
        open_storage("memory://a", storage_options={"deletes_per_second": given})


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
def test_s3_that_says_slow_down_is_obeyed_and_in_the_end_all_is_deleted(s3: s3server.S3Server, s3_url: str) -> None:
    with proxy.before(s3.endpoint) as between:
        options = {**replace(s3, endpoint=between.endpoint).options, "deletes_per_second": 2000}
        place = open_storage(s3_url, storage_options=options)
        for number in range(5):
            place.put(f"step_1/{number}", [b"x"])
        before = len(between.seen)
        between.harm(proxy.Harm.SLOW_DOWN, "delete_objects", times=2)
        place.delete_tree("step_1")
        assert place.list("step_1") == []
        assert [seen.kind for seen in between.seen[before:]].count("delete_objects") == 3
        assert isinstance(place, FsspecStorage)
        assert place._deletes.rate == pytest.approx(2000 / 4 * 1.25)
        place.close()
