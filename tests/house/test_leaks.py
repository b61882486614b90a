"""The leak guard sees what it is for, names it, and lets pass what ends in time or lasts by design."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import leaks as guard
from tests.leaks import held, leaks


@pytest.fixture
def undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Takes the planted leak away before the guard of this test itself looks; and makes it impatient."""
    monkeypatch.setattr(guard, "PATIENCE_S", 0.2)
    with ExitStack() as stack:
        yield stack


def thread(undo: ExitStack, name: str = "leaking-thread") -> str:
    end = threading.Event()
    made = threading.Thread(target=end.wait, name=name, daemon=True)
    made.start()
    undo.callback(made.join)
    undo.callback(end.set)
    return "thread 'leaking-thread'"


def file(undo: ExitStack) -> str:
    descriptor = os.open(__file__, os.O_RDONLY)
    undo.callback(os.close, descriptor)
    return f"file {descriptor}: {Path(__file__).resolve()}"


def pipe(undo: ExitStack) -> str:
    ends = os.pipe()
    for end in ends:
        undo.callback(os.close, end)
    return f"file {ends[0]}: pipe:["


def process(undo: ExitStack) -> str:
    code = "import sys; sys.stdin.read()"
    made = undo.enter_context(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE))
    return f"process {made.pid}: {sys.executable} -c"


def shared_memory(undo: ExitStack) -> str:
    name = f"leaking-{os.getpid()}-{uuid.uuid4().hex}"
    path = guard.SHARED_MEMORY / name
    path.write_bytes(b"x")
    undo.callback(path.unlink)
    return f"shared memory {name}"


@pytest.mark.parametrize("plant", [thread, file, pipe, process, shared_memory], ids=lambda plant: plant.__name__)
def test_what_is_left_behind_is_named(plant: Callable[[ExitStack], str], undo: ExitStack) -> None:
    before = held()
    said = plant(undo)
    assert any(leak.startswith(said) for leak in leaks(before)), leaks(before)
    undo.close()
    assert leaks(before) == []


def test_what_ends_soon_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    timer = threading.Timer(0.2, lambda: None)
    timer.start()
    assert leaks(before) == []
    assert not timer.is_alive()


def test_what_is_declared_is_no_leak(undo: ExitStack) -> None:
    before = held()
    thread(undo, "declared-1")
    assert leaks(before, threads=("declared-",)) == []
    file(undo)
    assert leaks(before, threads=("declared-",), files=(str(Path(__file__).parent),)) == []


def test_the_shared_memory_of_another_program_is_not_ours(undo: ExitStack) -> None:
    before = held()
    path = guard.SHARED_MEMORY / f"somebody-elses-1-{os.getppid()}"
    path.write_bytes(b"x")
    undo.callback(path.unlink)
    assert leaks(before) == []


def test_a_number_that_no_process_can_have_is_part_of_a_name(undo: ExitStack) -> None:
    before, path = held(), Path(f"/dev/shm/shardckpt-{os.getpid()}-204293969474")
    path.touch()
    undo.callback(path.unlink)
    assert leaks(before) == [f"shared memory {path.name}"]
