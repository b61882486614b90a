"""Another process writes: the same bytes; and when it dies, hangs or fails, the step is absent and the next commits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import shardckpt as sc
from shardckpt.engine.writing.process import ProcessStorage, WriterProcess
from shardckpt.engine.writing.shared import SharedMap, place_in
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import blank_state, make_state, same

ROOT = Path(__file__).parents[3]
LIMIT_S = 20.0
IMAGE = "memfd:shardckpt-image"
OTHER = sc.Manners(process=True)
SLOW = sc.Manners(process=True, rate=1e6)
"""So that a save of a few megabytes is met while it is being written."""


def until(holds: Callable[[], Any]) -> Any:
    """What it gives as soon as that is something."""
    end = time.monotonic() + LIMIT_S
    while not (found := holds()):
        assert time.monotonic() < end, "that did not come to pass"
        time.sleep(0)
    return found


def is_dead(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def local(root: Any, manners: sc.Manners = OTHER, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, sc.Gangs.local(), manners=manners, **options)


def writer_of(checkpoints: sc.CheckpointManager) -> WriterProcess:
    assert isinstance(checkpoints._written, ProcessStorage)
    return checkpoints._written.writer


def large(step: int) -> dict[str, Any]:
    return {"weight": torch.full((1_000_000,), float(step))}


def files(root: Path) -> dict[str, bytes]:
    found = list(root.rglob("*.pt"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_bytes_are_those_that_a_thread_writes(tmp_path: Path, ranks: int) -> None:
    """Files of a rank alone, and files that ranks write together in ranges."""

    def act(gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        for name, manners in (("thread", None), ("process", OTHER)):
            with sc.CheckpointManager(tmp_path / name, gangs, manners=manners) as checkpoints:
                for step in (1, 2):
                    checkpoints.save(step, make_state(rank, step), replicated=("model",)).result()
                if manners is not None:
                    pid = writer_of(checkpoints).pid
                    assert pid is not None
                    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
                state = blank_state(rank)
                checkpoints.load(2, state)
                assert same(state, make_state(rank, 2))

    run_ranks(ranks, act)
    assert files(tmp_path / "process") == files(tmp_path / "thread")
    assert len(files(tmp_path / "process")) == 2 * (ranks + (ranks > 1)) or ranks == 1


@pytest.mark.crash
@pytest.mark.parametrize("how", ["killed", "stopped", "cancelled"])
def test_in_the_middle_of_a_put(tmp_path: Path, how: str) -> None:
    with local(tmp_path, SLOW) as checkpoints:
        writer = writer_of(checkpoints)
        checkpoints.save(1, make_state(0, 1)).result()
        victim = writer.pid
        deadline = timedelta(seconds=1) if how == "stopped" else None
        pending = checkpoints.save(2, large(2), deadline=deadline)
        until(lambda: list(tmp_path.glob("step_2.*.tmp/rank_0.pt")))
        if how == "cancelled":
            pending.cancel()
        else:
            os.kill(victim, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        with pytest.raises(sc.CheckpointSaveError) as caught:
            pending.result()
        said = {"killed": "was killed by SIGKILL", "stopped": "took longer", "cancelled": "cancelled"}
        assert said[how] in str(caught.value)
        assert checkpoints.steps() == [1]
        checkpoints.save(3, make_state(0, 3)).result()
        state = blank_state(0)
        checkpoints.load(3, state)
        assert same(state, make_state(0, 3))
        assert writer.pid != victim
        until(lambda: not psutil.pid_exists(victim))
        assert checkpoints.steps() == [1, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_that_fails_there_fails_the_step_and_no_more(tmp_path: Path) -> None:
    """As on a full disk; the process stays."""
    with local(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(0, 1)).result()
        pid = writer_of(checkpoints).pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1_000_000, -1))
        with pytest.raises(sc.CheckpointSaveError, match="larger than the file system"):
            checkpoints.save(2, large(2)).result()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        checkpoints.save(3, large(3)).result()
        assert checkpoints.steps() == [1, 3]
        assert writer_of(checkpoints).pid == pid


@pytest.mark.crash
def test_of_one_rank_and_all_ranks_know(tmp_path: Path) -> None:

    def act(gangs: sc.Gangs) -> tuple[str, list[int]]:
        rank = gangs.root.rank
        with sc.CheckpointManager(tmp_path, gangs, manners=SLOW if rank else OTHER) as checkpoints:
            checkpoints.save(1, make_state(rank, 1)).result()
            pending = checkpoints.save(2, {**make_state(rank, 2), **large(rank)})
            if rank == 1:
                until(lambda: list(tmp_path.glob("step_2.*.tmp/rank_1.pt")))
                os.kill(writer_of(checkpoints).pid, signal.SIGKILL)
            with pytest.raises(sc.CheckpointSaveError) as caught:
                pending.result()
            checkpoints.save(3, make_state(rank, 3)).result()
            return str(caught.value), checkpoints.steps()

    for said, steps in run_ranks(2, act):
        assert "rank 1: OSError: cannot write" in said
        assert "killed by SIGKILL" in said
        assert steps == [1, 3]


@pytest.mark.crash
def test_killed_while_it_has_nothing_to_do_no_save_fails(tmp_path: Path) -> None:
    with local(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(0, step)).result()
            pid = writer_of(checkpoints).pid
            os.kill(pid, signal.SIGKILL)
            until(partial(is_dead, pid))
        assert checkpoints.steps() == [1, 2, 3]


def test_it_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local(tmp_path) as checkpoints:
        for program, said in (("/bin/false", "ended with status 1"), ("/no/such/program", "No such file")):
            monkeypatch.setattr(sys, "executable", program)
            with pytest.raises(sc.CheckpointSaveError, match=said):
                checkpoints.save(1, make_state(0, 1)).result()
        monkeypatch.undo()
        checkpoints.save(2, make_state(0, 2)).result()
        assert checkpoints.steps() == [2]


def test_what_the_storage_raises_there_is_raised_here(tmp_path: Path) -> None:
    image, writer = SharedMap(8192), WriterProcess(str(tmp_path), None, OTHER)
    image[:] = bytes(range(256)) * 32
    view = memoryview(image)
    storage = ProcessStorage(LocalStorage(tmp_path), writer)
    assert storage.put("a/b", [view[4096:5000], view[:10]]) == 914
    assert storage.read("a/b") == bytes(view[4096:5000]) + bytes(view[:10])
    pid = writer.pid
    with pytest.raises(FileExistsError, match="a/b"):
        storage.put("a/b", [view])
    with pytest.raises(RuntimeError, match=r"ValueError.*not a storage key"):
        writer.put("../b", [view])
    assert storage.put_range("c", 4096, [view[:100]]) == 100
    assert storage.read("c")[4096:] == bytes(view[:100])
    assert writer.pid == pid
    assert storage.put("d", [b"not shared"]) == 10
    storage.close()
    storage.close()
    assert writer.pid is None


def test_a_save_that_was_given_up_while_it_waited_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GivenUp(list[memoryview]):
        def __getitem__(self, number: Any) -> Any:
            raise sc.CheckpointSaveError("cancelled")

    monkeypatch.setattr(sys, "executable", "/no/such/program")
    writer = WriterProcess(str(tmp_path), None, OTHER)
    with pytest.raises(sc.CheckpointSaveError, match="cancelled"):
        writer.put("a", GivenUp([memoryview(SharedMap(4096))]))


def test_images_that_are_gone_here_are_gone_there(tmp_path: Path) -> None:
    writer = WriterProcess(str(tmp_path), None, OTHER)
    for number in range(4):
        image = SharedMap(4096)
        writer.put(f"{number}", [memoryview(image)])
    mapped = Path(f"/proc/{writer.pid}/maps").read_text().count("memfd:shardckpt-image")
    assert mapped <= 2  # the last, and the one before until the next message
    writer.close()


def test_signals_to_the_job_are_not_for_it(tmp_path: Path) -> None:
    image, writer = SharedMap(4096), WriterProcess(str(tmp_path), None, OTHER)
    writer.put("a", [memoryview(image)])
    pid = writer.pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, number)
    writer.put("b", [memoryview(image)])
    assert writer.pid == pid
    assert os.getsid(pid) != os.getsid(0)
    writer.close()


@pytest.mark.crash
def test_it_ends_with_the_process_that_it_writes_for(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from shardckpt.engine.background.manners import Manners\n"
        "from shardckpt.engine.writing.process import WriterProcess\n"
        "from shardckpt.engine.writing.shared import SharedMap\n"
        "image, writer = SharedMap(4096), WriterProcess(sys.argv[1], None, Manners())\n"
        "writer.put('a', [memoryview(image)])\n"
        "assert 'torch' not in sys.modules\n"
        "print(writer.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: not psutil.pid_exists(int(done.stdout)))


def test_a_place_that_only_this_process_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a path or a URL only"):
        local(MemoryStorage())
    with local("memory://here") as checkpoints, pytest.raises(sc.CheckpointSaveError):
        checkpoints.save(1, make_state(0, 1)).result()


def test_which_memory_is_shared() -> None:
    image = SharedMap(8192)
    view = memoryview(image)
    assert place_in(view[100:200]) == (image, 100)
    assert place_in(view[4096:][:10]) == (image, 4096)
    for other in (memoryview(bytearray(10)), memoryview(b"read only"), view[:0], view.toreadonly()):
        assert place_in(other) is None


def opened(name: str) -> int:
    """How many files of that name this process has open. Other threads may close theirs meanwhile."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += name in os.readlink(f"/proc/self/fd/{number}")
    return found


def test_many_saves_leave_no_more_than_few(tmp_path: Path) -> None:
    with local(tmp_path, keep=sc.KeepLast(1)) as checkpoints:
        held = []
        for step in range(1, 13):
            checkpoints.save(step, make_state(0, step)).result()
            pid = writer_of(checkpoints).pid
            maps = Path(f"/proc/{pid}/maps").read_text().count(IMAGE)
            held.append((opened(IMAGE), psutil.Process(pid).num_fds(), maps))
        assert set(held[2:]) == {held[2]}
        assert held[2][2] > 0
