"""Each phase of the process that writes x {is killed, raises, hangs, stops}: the job goes on, the step is absent on all
ranks, who know of whom, the next commits, and nothing is left."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import shardckpt as sc
from shardckpt.engine.writing import process as process_module
from shardckpt.engine.writing.process import WriterProcess
from shardckpt.engine.writing.shared import SharedMap
from shardckpt.testing.gangs import run_ranks
from tests.engine.writing import struck
from tests.engine.writing.struck import AFTER, AT_START, BETWEEN, IN_PUT, KINDS, LAST
from tests.engine.writing.test_writer_process import OTHER, ROOT, until, writer_of
from tests.faults.gangwork import blank_state, make_state, same

pytestmark = pytest.mark.crash

PATIENT = timedelta(minutes=5)
"""Longer than a test may take: what ends in time does so because of the deadline of the save."""
LIMIT = timedelta(seconds=30)
SOON, STARTED = timedelta(seconds=1.2), timedelta(seconds=3)
"""Deadlines of the save that meets a hang, where a process is there already, and where it has to start first."""

ALONE = [(phase, kind, 1, 0) for phase in (*AT_START, *IN_PUT, AFTER) for kind in KINDS]
ALONE += [(BETWEEN, kind, 1, 0) for kind in ("hangs", "stops")]  # from who died there more or less may be known already
OF_TWO = [(phase, kind, 2, number % 2) for number, (phase, kind, _, _) in enumerate(ALONE[::3])]


def has_ended(writer: WriterProcess) -> bool:
    """With all its threads: the first of them is a zombie before the others are gone."""
    return writer._process is None or writer._process.poll() is not None


def born(folder: Path) -> list[int]:
    return [int(path.name.partition("_")[2]) for path in folder.glob("born_*")]


def tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes that write be those that can be struck."""
    monkeypatch.setattr(process_module, "child", struck)


def save(checkpoints: sc.CheckpointManager, step: int, deadline: timedelta | None) -> str:
    """How it went, "" if well; the state changes as soon as training may go on."""
    rank = checkpoints._at.rank
    state = make_state(rank, step)
    pending = checkpoints.save(step, state, replicated=("model",), deadline=deadline)
    with checkpoints.guard():
        state["model"]["weight"].zero_()
    assert pending.wait(LIMIT)
    failure = pending.failure()
    pending.mark_seen()
    return "" if failure is None else str(failure)


def absent_step(phase: str, kind: str) -> int | None:
    """What the fault costs: an answer that was lost costs the step as well, since nobody knows that the file is whole;
    a process that dies between two saves costs nothing, and one that hangs there the next."""
    if phase != AFTER:
        return 2
    return 3 if kind in ("hangs", "stops") else None


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("phase", "kind", "ranks", "victim"), [*ALONE, *OF_TWO])
def test_the_job_goes_on_and_the_next_save_commits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: str, kind: str, ranks: int, victim: int
) -> None:
    tell(monkeypatch)
    folder, root = tmp_path / "fault", tmp_path / "run"
    folder.mkdir()
    absent, hangs = absent_step(phase, kind), kind in ("hangs", "stops")

    def act(gangs: sc.Gangs) -> dict[int, str]:
        rank = gangs.root.rank
        said = {}
        with sc.CheckpointManager(root, gangs, manners=OTHER, timeout=PATIENT) as checkpoints:
            writer = writer_of(checkpoints)
            writer._told["struck"] = (phase if rank == victim else "", kind, str(folder))
            for step in (1, 2, 3, 4):
                if step == 2 and rank == victim:
                    if phase in AT_START:
                        writer.close()  # so that another one starts
                    (folder / "armed").touch()
                deadline = (STARTED if phase in AT_START else SOON) if hangs and step == absent else None
                said[step] = save(checkpoints, step, deadline)
                if step == 2 and rank == victim and phase == AFTER:
                    until((folder / "met").exists)
                    if not hangs:
                        until(partial(has_ended, writer))
            assert checkpoints.steps() == [step for step in said if step != absent], said
            loaded = blank_state(rank)
            for step in checkpoints.steps():
                checkpoints.load(step, loaded)
                assert same(loaded, make_state(rank, step))
        return said

    for rank, said in enumerate(run_ranks(ranks, act)):
        assert [step for step, text in said.items() if text] == ([absent] if absent else [])
        if absent and rank != victim:
            assert f"rank {victim}" in said[absent]
        if absent and kind == "is killed":
            assert "was killed by SIGKILL" in said[absent]
    assert (folder / "met").exists(), "else nothing has been tested"
    stays = kind == "raises" and phase in IN_PUT[:-2]  # an error of the storage
    assert len(born(folder)) == ranks + (not stays) + (phase in AT_START)
    assert all(not psutil.pid_exists(pid) for pid in born(folder))
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("kind", KINDS)
def test_at_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """Also where not even the thread that looks after the line runs any more."""
    tell(monkeypatch)
    monkeypatch.setattr(process_module, "_FAREWELL_S", 0.5)
    with sc.CheckpointManager(tmp_path / "run", sc.Gangs.local(), manners=OTHER, timeout=PATIENT) as checkpoints:
        writer_of(checkpoints)._told["struck"] = (LAST, kind, str(tmp_path))
        assert not save(checkpoints, 1, None)
        (tmp_path / "armed").touch()
    assert (tmp_path / "met").exists()
    assert not psutil.pid_exists(*born(tmp_path))


class CancelledError(Exception):
    """Of the save whose parts these are."""


class Parts(list[memoryview]):
    """Parts of a save that may be cancelled."""

    cancelled = False

    def __getitem__(self, number: Any) -> Any:
        if self.cancelled:
            raise CancelledError
        return super().__getitem__(number)


def test_a_message_that_is_not_taken_holds_nobody_up(tmp_path: Path) -> None:
    """A long one, to a process that is stopped, does not fit into the line; whoever sends it can be called off."""
    image, writer = SharedMap(1 << 20), WriterProcess(str(tmp_path), None, OTHER)
    view = memoryview(image)
    writer.put("a", [view])
    victim = writer.pid
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)
    parts, raised = Parts(view[at : at + 1] for at in range(100_000)), list[BaseException]()

    def put() -> None:
        try:
            writer.put("b", parts)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=put, name="put")
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    parts.cancelled = True
    thread.join(LIMIT.total_seconds())
    ended = not thread.is_alive()
    if not ended:
        os.kill(victim, signal.SIGKILL)
    assert ended
    assert isinstance(raised[0], CancelledError)
    assert not psutil.pid_exists(victim)
    parts.cancelled = False
    assert writer.put("c", parts) == 100_000
    writer.close()


def test_the_line_may_be_any_descriptor(tmp_path: Path) -> None:
    """`select.select` knows those below 1024 only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    image, writer = SharedMap(4096), WriterProcess(str(tmp_path), None, OTHER)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        while stack.enter_context(open(os.devnull)).fileno() < 1100:
            pass
        assert writer.put("a", [memoryview(image)]) == 4096
        assert writer._line is not None
        assert writer._line.fileno() > 1024
        writer.close()


_ALONE = """
import os, signal, sys, threading
from pathlib import Path
from shardckpt.engine.background.manners import Manners
from shardckpt.engine.writing import process
from shardckpt.engine.writing.shared import SharedMap
from tests.engine.writing import struck
process.child, folder = struck, Path(sys.argv[1])
image, writer = SharedMap(4096), process.WriterProcess(sys.argv[1], None, Manners())
writer._told["struck"] = ("put", "hangs", sys.argv[1])
(folder / "armed").touch()
threading.Thread(target=writer.put, args=("a", [memoryview(image)]), daemon=True).start()
while not (folder / "met").exists():
    pass
print(writer.pid, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_one_that_hangs_ends_with_the_process_that_it_writes_for(tmp_path: Path, end: str) -> None:
    """Which was killed, or ended without a farewell; what hangs does not look at its line."""
    code = [sys.executable, "-c", _ALONE.format(end=end), str(tmp_path)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if "kill" in end else 0), done.stderr
    until(lambda: not psutil.pid_exists(int(done.stdout)))


def test_one_that_can_not_be_started_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the interpreter lies on a file system that does not answer: no save, and no farewell, waits for it."""
    over, real = threading.Event(), subprocess.Popen

    def hang(*args: Any, **options: Any) -> Any:
        assert over.wait(2 * LIMIT.total_seconds())
        return real(*args, **options)

    monkeypatch.setattr(process_module, "_FAREWELL_S", 0.1)
    monkeypatch.setattr(subprocess, "Popen", hang)
    try:
        with sc.CheckpointManager(tmp_path, sc.Gangs.local(), manners=OTHER, timeout=PATIENT) as checkpoints:
            for step in (1, 2):
                assert "took longer" in save(checkpoints, step, timedelta(seconds=0.3))
            assert checkpoints.steps() == []
        assert "left behind" in caplog.text
        assert not over.is_set()
    finally:
        over.set()
