"""Reads past the page cache: the same bytes, whether they are in it or not, wherever the file ends."""

from __future__ import annotations

import mmap
import os
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


def went(ways: uncached.Ways, nbytes: int, seconds: tuple[float, float]) -> list[int]:
    """The ways that reads of so many bytes go, where a read takes so long by each."""
    gone = []
    for _ in range(nbytes // PIECE):
        gone.append(way := ways.next(PIECE))
        ways.took(way, PIECE, seconds[way])
    return gone


@pytest.mark.parametrize("faster", [0, 1])
def test_most_goes_the_faster_way(faster: int) -> None:
    ways, seconds = uncached.Ways(), (1.0, 2.0) if faster == 0 else (2.0, 1.0)
    gone = went(ways, 16 << 30, seconds)
    assert set(gone[: 64 << 20]) == {0, 1}
    assert gone.count(faster) > 0.92 * len(gone)


def test_the_way_is_changed_when_the_other_has_become_faster() -> None:
    ways = uncached.Ways()
    went(ways, 4 << 30, (1.0, 2.0))
    gone = went(ways, 16 << 30, (4.0, 1.0))
    assert gone.count(1) > 0.85 * len(gone)


def test_reads_of_an_earlier_turn_do_not_count_for_a_later_one() -> None:
    ways = uncached.Ways()
    late = [ways.next(PIECE) for _ in range(64 << 20 >> 22)]
    ways.took(late[0], PIECE, 1.0)
    assert ways.next(PIECE) == 1
    for way in late[1:]:
        ways.took(way, PIECE, 100.0)
    went(ways, 64 << 20, (1.0, 2.0))
    assert went(ways, 1 << 29, (1.0, 2.0)).count(0) > 100


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
