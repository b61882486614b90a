"""The first large file finds out which way is the fastest, and lies there whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path

import pytest

from shardckpt.storage import METHODS, LocalStorage
from shardckpt.storage.posix.choose import Chooser, cut

PAGE = 4096
WAYS = ("direct", "dontcache", "buffered", "buffered", "dontcache", "direct")


def chooser_of(**seconds: float) -> Chooser:
    """One to whose clock each way takes that long; each trial writes two pages."""
    times = accumulate(chain.from_iterable((0.0, seconds[way]) for way in WAYS))
    return Chooser(stretch=2 * PAGE, clock=lambda: next(times))


def write(folder: Path, chooser: Chooser, parts: Iterable[bytes], *, nbytes: int, offset: int = 0) -> bytes:
    """What lies in a new file after the chooser wrote it."""
    path = folder / os.urandom(4).hex()
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        written = chooser.write(
            file, parts, reopen=lambda flags: os.open(path, os.O_WRONLY | flags), what="no", offset=offset
        )
    finally:
        os.close(file)
    assert written == nbytes
    return path.read_bytes()


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"direct": 1, "dontcache": 2, "buffered": 3}, "direct"),
        ({"direct": 3, "dontcache": 2, "buffered": 1}, "buffered"),
        ({"direct": 2, "dontcache": 1, "buffered": 3}, "dontcache"),
        ({"direct": 1.1, "dontcache": 1, "buffered": 3}, "direct"),
    ],
)
def test_the_fastest_is_kept_and_the_default_is_given_up_only_for_a_gain(
    tmp_path: Path, seconds: dict[str, float], chosen: str
) -> None:
    chooser, content = chooser_of(**seconds), os.urandom(30 * PAGE + 17)
    assert (
        write(tmp_path, chooser, [content[:5], content[5 : 9 * PAGE], content[9 * PAGE :]], nbytes=len(content))
        == content
    )
    assert chooser.method == METHODS[chosen]
    assert write(tmp_path, chooser, [content], nbytes=len(content)) == content, (
        "the clock has ended: nothing is tried again"
    )


def test_a_range_of_a_file_is_tried_as_well(tmp_path: Path) -> None:
    chooser, content = chooser_of(direct=3, dontcache=2, buffered=1), os.urandom(24 * PAGE)
    assert write(tmp_path, chooser, [content], nbytes=len(content), offset=8 * PAGE) == bytes(8 * PAGE) + content
    assert chooser.method == METHODS["buffered"]


def test_small_files_and_streams_try_nothing(tmp_path: Path) -> None:
    chooser, content = Chooser(stretch=2 * PAGE, clock=lambda: pytest.fail("tried")), os.urandom(23 * PAGE)
    assert write(tmp_path, chooser, [content], nbytes=len(content)) == content
    assert write(tmp_path, chooser, iter([content] * 3), nbytes=3 * len(content)) == 3 * content


def test_a_failed_sync_of_a_trial_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
    chooser = chooser_of(direct=1, dontcache=1, buffered=1)
    with pytest.raises(OSError, match="no: "):
        write(tmp_path, chooser, [bytes(30 * PAGE)], nbytes=30 * PAGE)
    assert chooser.method == METHODS["direct"]


def test_a_way_that_was_given_is_kept(tmp_path: Path) -> None:
    assert LocalStorage(tmp_path, write="buffered").write_method == METHODS["buffered"]
    assert LocalStorage(tmp_path).write_method == METHODS["direct"]


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 10), (2, 3), (3, 7), (9, 10), (4, 99)])
def test_cut(start: int, end: int) -> None:
    parts = [b"012", b"", b"3456", b"789"]
    assert b"".join(cut(parts, start, end)) == b"".join(parts)[start:end]
