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
        assert uncached.read_past_cache(file, pages[1 : 2 << 20], 0) == 0
        assert uncached.read_past_cache(file, pages[:100], 0) == 0
        assert uncached.read_past_cache(file, pages, 1) == 0
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
