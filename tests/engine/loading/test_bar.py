"""The bar of a long load: on a terminal, on rank 0, for as long as it takes; and never anything that waits for it."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.loading.fetching import bar, meter, pieces, straight
from shardckpt.engine.loading.fetching.meter import Meter, read_metered
from shardckpt.gang.gangs import Gangs
from shardckpt.storage import LocalStorage, MemoryObjects, MemoryStorage, Read, Storage
from shardckpt.testing.gangs import run_ranks

BAR = re.compile(r"step 1: reading \[#*\.*\] +\d+%  [\d.]+ k?B of [\d.]+ kB  [\d.]+ [kMG]?B/s")


class Screen:
    """A terminal of 100 columns: what was written to it, and what stands there now."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.stream = os.fdopen(os.dup(self.theirs), "w")
        self.shown = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        while not done(self.shown):
            assert select.select([self._ours], [], [], 60)[0], f"in vain: {self.shown!r}"
            self.shown += os.read(self._ours, 65536).decode()

    def stands(self) -> str:
        """The last line as a person sees it."""
        while select.select([self._ours], [], [], 0)[0]:
            self.shown += os.read(self._ours, 65536).decode()
        line = ""
        for text in self.shown.rpartition("\n")[2].split("\r"):
            line = text + line[len(text) :]
        return line.rstrip()

    def close(self) -> None:
        self.stream.close()
        os.close(self.theirs)
        os.close(self._ours)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Where stderr leads to once a test says so (pytest has its own when the test begins); and loads are long."""
    terminal = Screen()
    monkeypatch.setattr(bar, "MOMENT_S", 0.0)
    monkeypatch.setattr(bar, "_REDRAW_S", 0.01)
    yield terminal
    terminal.close()


def model() -> dict[str, Any]:
    return {"model": {f"w{number}": torch.arange(1000.0) + number for number in range(8)}}


def saved(storage: Storage) -> Storage:
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, model()).result()
    return storage


def load(storage: Storage, gangs: Gangs | None = None, **policy: Any) -> None:
    state = {"model": {name: torch.zeros(1000) for name in model()["model"]}}
    with sc.CheckpointManager(storage, gangs) as checkpoints:
        checkpoints.load(1, state, policy=sc.LoadPolicy(**policy))
    for name, tensor in model()["model"].items():
        assert torch.equal(state["model"][name], tensor)


@pytest.mark.parametrize("way", ["where it lies", "in place", "by way of memory"])
def test_it_stands_while_the_load_goes_on_and_then_no_more(
    way: str, tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", screen.stream)
    storage = saved(LocalStorage(tmp_path) if way != "by way of memory" else MemoryStorage())
    for module, name in ((pieces, "PIECE"), (straight, "_PIECE"), (meter, "_BATCH")):
        monkeypatch.setattr(module, name, 4000)
    seen, plain = threading.Event(), Meter.add

    def held(self: Meter, nbytes: int) -> None:
        plain(self, nbytes)
        assert seen.wait(60)

    monkeypatch.setattr(Meter, "add", held)
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load, storage, in_place=way == "in place")
        try:
            screen.read_until(BAR.search)
        finally:
            seen.set()
        loading.result(60)
    assert "\n" not in screen.shown
    assert screen.stands() == ""
    assert max(map(len, screen.shown.split("\r"))) < 100


@pytest.mark.parametrize("reason", ["a file", "closed", "no stream", "warnings are off", "it is quick"])
def test_it_is_not_there(
    reason: str, tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And then nothing is counted, nor read otherwise than ever."""
    drawn, counted, plain, batches = list[str](), list[int](), bar._draw, meter._batches
    monkeypatch.setattr(bar, "_draw", lambda *given: (drawn.append(given[1]), plain(*given)))
    monkeypatch.setattr(meter, "_batches", lambda reads: (counted.append(len(reads)), batches(reads))[1])
    path = tmp_path / "stderr"
    monkeypatch.setattr("sys.stderr", screen.stream)
    with path.open("w") as file:
        closed = path.open()
        closed.close()
        if reason in ("a file", "closed", "no stream"):
            monkeypatch.setattr("sys.stderr", {"a file": file, "closed": closed, "no stream": None}[reason])
        if reason == "warnings are off":
            caplog.set_level(logging.ERROR, logger="shardckpt")
        if reason == "it is quick":
            monkeypatch.setattr(bar, "MOMENT_S", 60.0)
        load(saved(MemoryStorage()))
    assert (drawn, bool(counted)) == ((["step 1"], True) if reason == "it is quick" else ([], False))
    assert (screen.stands(), screen.shown, path.read_text()) == ("", "", "")


def test_one_rank_of_all_has_it(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", screen.stream)
    drawn, plain = list[bool](), bar._draw
    monkeypatch.setattr(bar, "_draw", lambda *given: (drawn.append(given[2]), plain(*given)))
    storage = saved(MemoryObjects())
    run_ranks(2, lambda gangs: load(storage, gangs))
    assert drawn == [False]  # not alone
    assert screen.stands() == ""


def test_a_terminal_that_takes_nothing_holds_no_load_up(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S was pressed: the bar waits, and nobody waits for the bar."""
    monkeypatch.setattr("sys.stderr", screen.stream)
    monkeypatch.setattr(bar, "_FAREWELL_S", 0.05)
    storage = saved(MemoryStorage())
    termios.tcflow(screen.theirs, termios.TCOOFF)
    try:
        load(storage)
    finally:
        termios.tcflow(screen.theirs, termios.TCOON)
    for thread in threading.enumerate():
        if thread.name == "shardckpt-bar":
            thread.join(60)
    assert screen.stands() == ""


def test_a_terminal_that_goes_away_is_no_error(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()

    def write(text: str) -> None:
        gone.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", screen.stream)
    monkeypatch.setattr(screen.stream, "write", write)
    with bar.shown(Meter(), "step 1"):
        assert gone.wait(60)


BEHIND = """
import fcntl, os, sys, termios, threading
from shardckpt.engine.loading.fetching import bar
from shardckpt.engine.loading.fetching.meter import Meter
assert "torch" not in sys.modules
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
if sys.argv[1] == "behind":  # another process group has the terminal
    other = os.fork()
    if not other:
        os.setpgid(0, 0)
        os.read(0, 1)
        os._exit(0)
    os.setpgid(other, other)
    os.tcsetpgrp(2, other)
bar.MOMENT_S, bar._REDRAW_S = 0, 0.01
asked, plain = threading.Semaphore(0), bar._in_front
bar._in_front = lambda stream: (plain(stream), asked.release())[0]
with bar.shown(Meter(), "step 1"):
    assert asked.acquire(timeout=60) and asked.acquire(timeout=60)
"""


@pytest.mark.parametrize("place", ["front", "behind"])
def test_a_program_in_the_background_leaves_the_terminal_alone(place: str) -> None:
    terminal = Screen()
    command = [sys.executable, "-c", BEHIND, place]
    subprocess.run(
        command, stdin=subprocess.DEVNULL, stderr=terminal.theirs, start_new_session=True, timeout=100, check=True
    )
    assert terminal.stands() == ""
    assert ("step 1: opening, 0 s" in terminal.shown) == (place == "front")
    terminal.close()


def test_a_line() -> None:
    metered = Meter()
    metered.watched = True

    def told(columns: int, seconds: float, *, alone: bool = True) -> str:
        return bar.line(metered, "step 7", columns, alone=alone, now=metered.began + seconds)

    assert told(80, 12) == "step 7: opening, 12 s"
    metered.begin("reading", [1_500_000_000, 500_000_000])
    metered.add(500_000_000)
    full = "step 7: reading [######..................]  25%  500 MB of 2 GB  125 MB/s  0:12 left"
    assert told(120, 4) == full
    assert told(80, 4) == "step 7: reading [####..........]  25%  500 MB of 2 GB  125 MB/s  0:12 left"
    assert told(70, 4) == "step 7: reading  25%  500 MB of 2 GB  125 MB/s  0:12 left"
    assert told(12, 4) == "step 7: read"
    assert told(120, 0).endswith("500 MB of 2 GB  0 B/s")
    metered.add(1_500_000_000)
    assert told(80, 4) == "step 7: reading [##############] 100%  2 GB of 2 GB  500 MB/s"
    assert told(80, 4, alone=False) == "step 7: reading is done here, waiting for the other ranks"
    metered.begin("copying", [4_000_000_000_000])
    metered.add(1_000_000)
    assert told(80, 0.5) == "step 7: copying [..............]   0%  1 MB of 4 TB  2 MB/s  99:59:59 left"


def test_what_is_watched_is_read_in_batches_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_BATCH", 10)
    given: list[list[tuple[str, int, int]]] = []

    class Place(MemoryStorage):
        def read_into(self, reads: Any) -> None:
            given.append([(read.key, read.offset, len(read.into)) for read in reads])
            super().read_into(reads)

    storage, content = Place(), bytes(range(40))
    for key in "ab":
        storage.put(key, [content])
    into = [memoryview(bytearray(size)) for size in (25, 3, 0, 4)]
    reads = [Read("b", 2, into[0]), Read("a", 7, into[1]), Read("a", 0, into[2]), Read("a", 3, into[3])]
    watched = Meter()
    watched.watched = True
    read_metered(storage, reads, watched)
    assert sorted(given) == [[("a", 3, 4), ("a", 7, 3), ("b", 2, 3)], [("b", 5, 10)], [("b", 15, 10)], [("b", 25, 2)]]
    assert [bytes(view) for view in into] == [content[2:27], content[7:10], b"", content[3:7]]
    assert watched.done == 32
    given.clear()
    read_metered(storage, reads, Meter())
    assert given == [[("b", 2, 25), ("a", 7, 3), ("a", 0, 0), ("a", 3, 4)]]


def test_what_is_summed_up_as_it_comes_is_so_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_BATCH", 10)
    content = bytes(range(1, 60))

    class Summing(MemoryObjects):
        def read_summed(self, reads: Sequence[Read]) -> list[int]:
            self.read_into(reads)
            return [zlib.crc32(read.into) for read in reads]

    storage = Summing()
    storage.put("a", [content])
    watched = Meter()
    for watched.watched in (True, False):
        reads = [Read("a", at, memoryview(bytearray(nbytes))) for at, nbytes in ((0, 3), (20, 27), (3, 0), (5, 1))]
        sums = [zlib.crc32(content[read.offset : read.offset + len(read.into)]) for read in reads]
        assert read_metered(storage, reads, watched) == sums
