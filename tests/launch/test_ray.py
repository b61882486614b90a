"""launch/ray/train.py on a Ray cluster of this machine alone: a worker is killed, Ray starts all again; it goes on."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.house.source import ROOT
from tests.launch.long import asked_for, committed, resumed_at, wait_until

pytestmark = [pytest.mark.slow, asked_for, pytest.mark.timeout(1800)]


def test_a_worker_is_killed_and_ray_starts_all_again(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'ray[train]'")
    log, root = tmp_path / "log", tmp_path / "run"
    command = [sys.executable, "launch/ray/train.py", str(root), "30000", "--storage", str(tmp_path / "notes")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as job,
    ):
        try:
            wait_until(lambda: len(committed(root)) >= 3 or job.poll() is not None, "it trains", log)
            before = committed(root)[-1]
            rank_1 = re.search(r"pid=(\d+)\) world_rank=1", log.read_text())
            assert rank_1 is not None, log.read_text()
            os.kill(int(rank_1[1]), signal.SIGKILL)
            wait_until(lambda: resumed_in(log) or job.poll() is not None, "it goes on", log)
            assert resumed_in(log)[0] >= before
            job.send_signal(signal.SIGINT)
        finally:
            left = children(job.pid)
            with suppress(subprocess.TimeoutExpired):
                job.wait(60)
            job.kill()
            for process in left:
                with suppress(psutil.Error):
                    process.kill()


def children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def resumed_in(log: Path) -> list[int]:
    return resumed_at(log.read_text())


def test_it_ends_and_the_next_job_goes_on(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'ray[train]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    for last, workers in ((60, "2"), (100, "1")):
        command = [sys.executable, "launch/ray/train.py", str(tmp_path / "run"), str(last), "--workers", workers]
        done = subprocess.run(
            [*command, "--storage", str(tmp_path / "notes")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert committed(tmp_path / "run")[-1] == last
    assert resumed_at(done.stdout) == [60]
