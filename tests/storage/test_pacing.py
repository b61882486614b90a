"""The limit of bytes per second, by a clock that only moves when somebody sleeps."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.storage.local import LocalStorage
from shardckpt.storage.transfer import pacing
from shardckpt.storage.transfer.pacing import Pacer


class Clock:
    """Time passes in `sleep` alone."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return use(monkeypatch)


def use(patch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    patch.setattr(pacing, "_now", clock)
    patch.setattr(pacing, "_sleep", clock.sleep)
    return clock


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 5)), min_size=1, max_size=30), st.floats(10, 1e5))
def test_never_more_than_the_rate_and_a_burst(takes: list[tuple[int, float]], rate: float) -> None:
    """In any stretch of time, whatever the pauses: the rate, a tenth of a second of it, and the last piece."""
    with pytest.MonkeyPatch.context() as patch:
        clock = use(patch)
        pacer, gone = Pacer(rate), []
        for nbytes, pause in takes:
            pacer.take(nbytes)
            gone.append((clock.now, nbytes))
            clock.sleep(pause)
    for first in range(len(gone)):
        for last in range(first, len(gone)):
            nbytes = sum(each for _, each in gone[first:last])
            assert nbytes <= rate * (gone[last][0] - gone[first][0] + 0.1) * (1 + 1e-6) + 1e-3


def test_without_pauses_it_is_the_rate_and_not_less(clock: Clock) -> None:
    pacer, began = Pacer(1e6), clock.now
    for _ in range(1000):
        pacer.take(5000)
    assert clock.now - began == pytest.approx(5, rel=0.03)


def test_the_first_piece_goes_at_once(clock: Clock) -> None:
    Pacer(1.0).take(10**9)
    assert clock.now == 1000.0


@pytest.mark.parametrize(("rate", "piece"), [(1.0, 4096), (1e6, 98304), (1e9, 2 << 20)])
def test_pieces_are_whole_pages_and_short_waits(rate: float, piece: int) -> None:
    assert Pacer(rate).piece == piece


def test_the_bytes_are_the_same_and_take_their_time(clock: Clock, tmp_path: Path) -> None:
    storage, content = LocalStorage(tmp_path), bytes(range(256)) * 4096
    pacer = Pacer(1e6)
    assert storage.put("a", pacer.pace([content[:300], content[300:]])) == len(content)
    assert storage.put_range("b", 4096, pacer.pace([memoryview(content)])) == len(content)
    assert storage.read("a") == content
    assert storage.read("b")[4096:] == content
    assert clock.now - 1000.0 == pytest.approx(2 * len(content) / 1e6, rel=0.15)


def test_threads_share_one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that stands still: who comes is told to wait until all before it are through."""
    waits: list[float] = []
    monkeypatch.setattr(pacing, "_now", lambda: 0.0)
    monkeypatch.setattr(pacing, "_sleep", waits.append)
    pacer = Pacer(100.0)
    threads = [threading.Thread(target=pacer.take, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([0.9, 1.9, 2.9, 3.9, 4.9, 5.9, 6.9])
