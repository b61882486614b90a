"""A signal to one rank, or to the agent of torchrun: one common step is committed, and that is where it resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.testing.gang_acts import await_marks, mark
from shardckpt.testing.pool import ProcessPool
from tests.manager.preempted import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("preempted.py")


class Job:
    """The program under torchrun; `pids` are those of its ranks, once all of them train."""

    def __init__(self, root: Path, ranks: int) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.agent = subprocess.Popen(
            [*torchrun, str(PROGRAM), str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        assert self.agent.stdout is not None
        self._said: list[str] = []
        self.pids: dict[int, int] = {}
        for line in self.agent.stdout:
            self._said.append(line)
            if line.startswith("trains "):
                rank, pid = line.split()[1:]
                self.pids[int(rank)] = int(pid)
            if len(self.pids) == ranks:
                return
        self.agent.kill()
        self.agent.communicate()
        raise AssertionError("".join(self._said))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing of it is left, also if the test has failed."""
        if self.agent.poll() is not None:
            return  # and its workers with it
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.kill()
        self.agent.communicate()

    def end(self) -> tuple[int, str, dict[int, tuple[int, int]]]:
        """Exit status, output, and by rank the step that was its last and the first one."""
        rest, _ = self.agent.communicate(timeout=100)
        ended = [line.split()[1:] for line in rest.splitlines() if line.startswith("ended ")]
        steps = {int(rank): (int(last), int(first)) for rank, last, first in ended}
        return self.agent.returncode, "".join([*self._said, rest]), steps


def committed(root: Path) -> list[str]:
    return sorted(record.parent.name for record in root.glob("step_*/manifest.json"))


def check_whole(root: Path, step: int, ranks: int) -> None:
    """Read by another job, of one process: every rank has added one in every step."""
    model = torch.nn.Linear(1, 1, bias=False)
    with sc.CheckpointManager(root, sc.Gangs.local()) as checkpoints:
        assert checkpoints.resume({"model": model}, policy=sc.LoadPolicy(unexpected="ignore")).step == step
    assert model.weight.item() == ranks * step


def train_on_a_rank(rank: int, world_size: int, folder: Path, root: Path, marks: Path) -> tuple[int, int]:
    (marks / f"pid_{rank}").write_text(str(os.getpid()))
    return train(str(root), lambda rank: mark(marks, "trains", rank))


def test_a_signal_to_one_worker_of_four(ranks: ProcessPool, tmp_path: Path) -> None:
    """Processes of the pool: what torchrun does about it, the next test sees."""
    marks, root = tmp_path / "marks", tmp_path / "run"
    marks.mkdir()

    def act() -> None:
        await_marks(marks, "trains", 4)
        os.kill(int((marks / "pid_3").read_text()), signal.SIGTERM)

    with ThreadPoolExecutor(1) as beside:
        sent = beside.submit(act)
        ended = ranks.run(4, train_on_a_rank, root, marks)
        sent.result()
    assert len(set(ended)) == 1, ended
    step, first = ended[0]
    assert first == 1
    assert committed(root) == [f"step_{step}"]
    check_whole(root, step, 4)


def test_a_signal_to_the_agent_and_in_the_next_job_to_one_of_two(tmp_path: Path) -> None:
    """torchrun sends on to all workers what it gets, and then ends with an error of its own, however they end."""
    with Job(tmp_path, 2) as job:
        job.agent.send_signal(signal.SIGTERM)
        status, output, ended = job.end()
    assert status == 1, output
    assert len(ended) == 2, output
    assert len(set(ended.values())) == 1, output
    step, _ = ended[0]
    assert committed(tmp_path) == [f"step_{step}"]
    with Job(tmp_path, 2) as again:
        os.kill(again.pids[1], signal.SIGUSR1)
        status, output, ended = again.end()
    assert status == 0, output
    assert len(set(ended.values())) == 1, output
    last, first = ended[0]
    assert first == step + 1
    assert committed(tmp_path) == sorted([f"step_{step}", f"step_{last}"])
    check_whole(tmp_path, last, 2)
