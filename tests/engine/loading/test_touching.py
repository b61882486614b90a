"""Memory that is touched while others fill it: it is there, and what they wrote; and memory that is given back."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import pytest

from shardckpt.engine.loading.fetching.touching import given_back, touched
from shardckpt.storage.posix.syscalls import in_memory

MiB = 1 << 20
LIMIT_S = 5.0


@pytest.fixture
def fresh() -> memoryview:
    return memoryview(mmap.mmap(-1, 64 * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def is_there(memory: memoryview, at: int) -> bool:
    return in_memory(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + at)


def test_it_is_there_though_nobody_has_written_to_it(fresh: memoryview) -> None:
    assert not is_there(fresh, 0)
    assert not is_there(fresh, len(fresh) - 1)
    end = time.monotonic() + LIMIT_S
    with touched(fresh):
        while not is_there(fresh, len(fresh) - 1):
            assert time.monotonic() < end, "nobody touches it"
            time.sleep(0.001)
    assert all(is_there(fresh, at) for at in range(0, len(fresh), MiB))


def test_what_was_written_meanwhile_stays(fresh: memoryview) -> None:
    pattern = bytes(range(1, 256)) * 4096
    places = range(0, len(fresh) - len(pattern), 2 * MiB)
    for at in places[::2]:  # before the thread comes by
        fresh[at : at + len(pattern)] = pattern
    with touched(fresh):
        for at in places[1::2]:
            fresh[at : at + len(pattern)] = pattern
        end = time.monotonic() + LIMIT_S
        while not is_there(fresh, len(fresh) - 1) and time.monotonic() < end:
            time.sleep(0.001)
    assert all(fresh[at : at + len(pattern)] == pattern for at in places)


def test_its_thread_ends_with_the_block_however_that_ends(fresh: memoryview) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), touched(fresh):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_without_a_thread_it_is_only_slower(fresh: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with touched(fresh):
        fresh[:3] = b"abc"
    assert bytes(fresh[:4]) == b"abc\0"


def test_what_was_used_is_given_back_and_nothing_beside_it(fresh: memoryview) -> None:
    """Of two neighbours with padding between them, in the wrong order; the bytes around them share their pages."""
    fresh[:] = b"x" * len(fresh)
    first, middle, end = 3 * MiB + 100, 7 * MiB + 1, 9 * MiB + 100
    given_back(fresh, [(middle + 63, end), (first, middle)])
    kept = [*range(0, first, 4096), first - 1, *range(end, len(fresh), 4096)]
    assert all(fresh[at] == ord("x") for at in kept)
    assert not any(is_there(fresh, at) for at in range(first + 4096, end - 4096, 4096))


def test_stretches_apart_are_given_back_apart_and_short_ones_not_at_all(fresh: memoryview) -> None:
    fresh[:] = b"x" * len(fresh)
    given_back(fresh, [(0, 2 * MiB), (4 * MiB, 6 * MiB), (8 * MiB, 8 * MiB + 4096)])
    there = [is_there(fresh, at * MiB) for at in range(9)]
    assert there == [False, False, True, True, False, False, True, True, True]
    assert bytes(fresh[2 * MiB : 4 * MiB]) == b"x" * (2 * MiB)
