"""Reads past the page cache: the same bytes, whether they are in it or not, wherever the file ends."""

from __future__ import annotations

import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardckpt.storage.base import Read
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import uncached

NBYTES = (3 << 20) + 1234
PIECE = 4 << 20


@pytest.fixture(autouse=True)
def ways(monkeypatch: pytest.MonkeyPatch) -> dict[int, uncached.Ways]:
    """As in a process that has read nothing yet."""
    fresh: dict[int, uncached.Ways] = {}
    monkeypatch.setattr(uncached, "_ways", fresh)
    return fresh


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    content = os.urandom(NBYTES)
    LocalStorage(tmp_path).put("file", [content])
    return content


@pytest.mark.parametrize("cached", ["all", "none", "the first page", "a page in the middle"])
def test_the_same_bytes_come_either_way(
    tmp_path: Path, content: bytes, cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, direct = os.open(tmp_path / "file", os.O_RDONLY), []
    past = uncached._direct
    monkeypatch.setattr(uncached, "_direct", lambda *what: direct.append(past(*what)) or direct[-1])
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        at, nbytes = {"all": (0, NBYTES), "none": (0, 0), "the first page": (0, 1)}.get(cached, (2 << 20, 1))
        os.pread(file, nbytes, at)
        for offset, length in ((0, NBYTES), (1 << 20, 2 << 20), (0, 100), (4096, NBYTES - 4096), (123, 2 << 20)):
            window = memoryview(mmap.mmap(-1, 4 << 20))[:length]
            LocalStorage(tmp_path).read_into([Read("file", offset, window)])
            assert bytes(window) == content[offset : offset + length]
    finally:
        os.close(file)
    if cached == "all":
        assert sum(direct) == 0


def test_memory_that_lies_otherwise_and_what_cannot_be_read_so(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        pages = memoryview(mmap.mmap(-1, 4 << 20))
        assert uncached.read_large(file, pages[1 : 2 << 20], 0) == 0
        assert uncached.read_large(file, pages[:100], 0) == 0
        assert uncached.read_large(file, pages, 1) == 0
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

        def refuse(*_: object) -> int:
            raise OSError("no such reads here")

        monkeypatch.setattr(uncached, "_direct", refuse)
        LocalStorage(tmp_path).read_into([Read("file", 0, pages[:NBYTES])])
        assert pages[:NBYTES] == content
        with pytest.raises(EOFError, match="ends too early"):
            LocalStorage(tmp_path).read_into([Read("file", 0, pages)])
    finally:
        os.close(file)


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(uncached, "time", clock)
    return clock


def went(clock: Clock, ways: uncached.Ways, nbytes: int, seconds: tuple[float, float, float]) -> list[int]:
    """The ways that reads of so many bytes go, one after the other, where a read takes so long by each."""
    gone = []
    for _ in range(nbytes // PIECE):
        gone.append(way := ways.begin(PIECE))
        clock.now += seconds[way]
        ways.end(way, PIECE)
    return gone


SECONDS = {0: (1.0, 2.0, 1.5), 1: (3.0, 1.0, 2.0), 2: (2.0, 3.0, 1.0)}
"""Of a read by each way, by the one that is the fastest."""


@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_most_goes_the_fastest_way(clock: Clock, fastest: int) -> None:
    ways = uncached.Ways()
    gone = went(clock, ways, 32 << 30, SECONDS[fastest])
    assert set(gone[: (300 << 20) // PIECE]) == {0, 1, 2}
    assert gone.count(fastest) > 0.9 * len(gone)


def test_the_way_is_changed_when_another_has_become_faster(clock: Clock) -> None:
    ways = uncached.Ways()
    went(clock, ways, 4 << 30, SECONDS[0])
    gone = went(clock, ways, 32 << 30, SECONDS[2])
    assert gone.count(2) > 0.85 * len(gone)


def test_many_at_once_count_by_what_they_bring_together(clock: Clock) -> None:
    ways, gone = uncached.Ways(), list[int]()
    for _ in range((2 << 30) // (6 * PIECE)):
        several = [ways.begin(PIECE) for _ in range(2)]
        if uncached.WAYS[several[-1]].at_once == 0:
            several += [ways.begin(PIECE) for _ in range(4)]
        # Six together take 3 s where two together take 2: more comes in a second, though each of them takes longer.
        clock.now += 3.0 if len(several) == 6 else 2.0
        for way in several:
            ways.end(way, PIECE)
        gone += several
    assert gone[-1] != 2


def test_reads_of_an_earlier_turn_do_not_count_for_a_later_one(clock: Clock) -> None:
    ways = uncached.Ways()
    late = [ways.begin(PIECE) for _ in range((96 << 20) // PIECE)]
    clock.now += 1.0
    ways.end(late[0], PIECE)
    first = ways.begin(PIECE)
    assert first == 1
    clock.now += 500.0  # the device is still busy with those of before
    for way in late[1:]:
        ways.end(way, PIECE)
    clock.now += 1.0
    ways.end(first, PIECE)
    # Way 0 brought a piece in a second, way 1 does so too, but for the 500 s, and way 2 needs twice as long.
    gone = went(clock, ways, 1 << 30, (1.0, 0.5, 2.0))
    assert gone.count(1) > 0.8 * len(gone)


def test_no_more_than_the_way_allows_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = uncached.Ways()
    monkeypatch.setattr(uncached, "WAYS", (uncached.Way(past=False, at_once=2), *uncached.WAYS[1:]))
    most, now, lock = [0], [0], threading.Lock()

    def read(_: int) -> None:
        way = ways.begin(PIECE // 64)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.002)
        with lock:
            now[0] -= 1
        ways.end(way, PIECE // 64)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(64)))
    assert most == [2]


def test_a_read_that_was_never_counted_out_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "WAYS", (uncached.Way(past=False, at_once=1), *uncached.WAYS[1:]))
    monkeypatch.setattr(uncached, "_PATIENCE_S", 0.05)
    ways = uncached.Ways()
    ways.begin(PIECE)
    ways.end(ways.begin(PIECE), PIECE)


def test_a_file_system_that_refuses_one_way_is_read_the_other(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, ways: dict[int, uncached.Ways]
) -> None:
    refused = []

    def refuse(*_: object) -> int:
        refused.append(1)
        raise OSError("no such reads here")

    monkeypatch.setattr(uncached, "_direct", refuse)
    pages = memoryview(mmap.mmap(-1, 4 << 20))
    file = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        for _ in range(200):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            LocalStorage(tmp_path).read_into([Read("file", 0, pages[:NBYTES])])
            assert pages[:NBYTES] == content
    finally:
        os.close(file)
    assert len(ways) == 1
    assert 0 < len(refused) < 50
