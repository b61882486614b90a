"""train.sbatch on a Slurm cluster of two nodes on this machine: preempted, out of time, a rank or a torchrun killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.house.source import ROOT
from tests.launch.long import asked_for, committed, resumed_at, steps, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, asked_for, pytest.mark.timeout(1800)]

FOR_EVER = 10**7
"""The last step of a training that something else ends."""


@dataclass
class Cluster:
    """Two nodes, and what is said to them."""

    environment: dict[str, str]
    folder: Path

    def call(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def train(self, last_step: int, *options: str) -> Job:
        log, root = self.folder / "job.log", self.folder / "run"
        number = self.call(
            *("sbatch", "--parsable", "--output", str(log), *options),
            *("launch/slurm/train.sbatch", str(root), str(last_step)),
        )
        return Job(self, number, log, root)


@dataclass
class Job:
    cluster: Cluster
    number: str
    log: Path
    root: Path

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> str:
        shown = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number)
        return shown.partition("JobState=")[2].split()[0]

    def trains(self, run: int) -> None:
        """Until that run of it has printed two of its steps."""
        wait_until(lambda: len(steps(self.said().partition(f"run {run}: node")[2])) >= 2, f"run {run} trains", self.log)

    def is_told_and_comes_again(self) -> None:
        """Its first run ends with a last save, and the second goes on from that one."""
        wait_until(lambda: "run 1: node" in self.said(), "put back and started again", self.log)
        first, _, _ = self.said().partition("run 1: node")
        assert "run 0: told to stop" in first
        last = steps(first)[-1]
        self.trains(1)
        assert resumed_at(self.said()) == [last]

    def is_cancelled(self) -> int:
        """Gives the step that it has saved last."""
        self.cluster.call("scancel", self.number)
        wait_until(lambda: self.state() == "CANCELLED", "cancelled", self.log)
        assert not self.processes()
        return committed(self.root)[-1]

    def processes(self) -> dict[psutil.Process, list[str]]:
        """All of this job, with what they were started as."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended
                if str(self.root) in process.cmdline():
                    found[process] = process.cmdline()
        return found

    def torchruns(self) -> list[psutil.Process]:
        started = self.processes().items()
        return [process for process, words in started if Path(words[1]).name == "torchrun"]

    def ranks(self) -> list[psutil.Process]:
        return [rank for torchrun in self.torchruns() for rank in torchrun.children()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "logs").mkdir()
    environment = {**os.environ, "RANKS": "1", "KEEP_LOGS": str(tmp_path / "logs"), "PYTHONPATH": str(ROOT)}
    tell = 'echo "$SLURM_CONF"; read -r _ || true'
    script = subprocess.Popen(
        ["bash", "launch/slurm/local.sh", "bash", "-c", tell],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    with script:
        told = script.stdout.readline().strip()
        assert told, "the cluster has not started"
        yield Cluster({**environment, "SLURM_CONF": told}, tmp_path)
        script.communicate(timeout=120)
    assert script.returncode == 0
    assert not Path(told).parent.exists()


def test_preempted_it_saves_and_comes_again_when_the_other_is_done(cluster: Cluster) -> None:
    job = cluster.train(FOR_EVER)
    job.trains(0)
    other = cluster.call(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2"
    )
    job.is_told_and_comes_again()
    assert "JobState=COMPLETED" in cluster.call("scontrol", "show", "job", other)
    before = steps(job.said())[-1]
    assert job.is_cancelled() >= before
    assert "run 2" not in job.said()


def test_out_of_time_it_saves_and_comes_again(cluster: Cluster) -> None:
    job = cluster.train(FOR_EVER, "--time=4", "--signal=B:USR1@100")  # Slurm may be a minute early
    job.is_told_and_comes_again()
    job.is_cancelled()


def test_a_rank_that_dies_is_started_again_within_the_job(cluster: Cluster) -> None:
    job = cluster.train(FOR_EVER)
    job.trains(0)
    ranks = job.ranks()
    assert len(ranks) == 2
    ranks[0].send_signal(signal.SIGKILL)
    wait_until(lambda: resumed_at(job.said()), "resumed", job.log)
    assert "run 1" not in job.said()
    job.is_cancelled()


def test_a_node_whose_torchrun_dies_puts_the_job_back(cluster: Cluster) -> None:
    job = cluster.train(FOR_EVER)
    job.trains(0)
    job.torchruns()[-1].send_signal(signal.SIGKILL)
    wait_until(lambda: "run 1: node" in job.said(), "put back and started again", job.log)
    job.trains(1)
    assert resumed_at(job.said())[-1] >= 40
    job.is_cancelled()


def test_what_is_finished_is_finished(cluster: Cluster) -> None:
    job = cluster.train(60)
    wait_until(lambda: job.state() == "COMPLETED", "completed", job.log)
    assert steps(job.said()) == [20, 40, 60]
    assert committed(job.root) == [20, 40, 60]
    job.log.unlink()
    again = cluster.train(60)
    wait_until(lambda: again.state() == "COMPLETED", "completed", again.log)
    assert steps(again.said()) == []
