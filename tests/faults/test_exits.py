"""A program that ends while a save is under way leaves a checkpoint or none, and does end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardckpt.storage.local import LocalStorage
from tests.faults import exits

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=100, cwd=REPOSITORY
    )


def committed(root: Path) -> list[str]:
    """The steps; nothing of an attempt that did not become one may be left but what a hung writer still holds."""
    return sorted(name for name in LocalStorage(root).list() if name.endswith("/") and ".tmp" not in name)


def test_one_process(tmp_path: Path) -> None:
    done = run("-m", "tests.faults.exits", str(tmp_path))
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    for program, (status, commits) in exits.ALONE.items():
        name = program.__name__
        assert ended[name] == status, f"{name}\n{done.stderr}"
        steps = ["step_1/"] + ["step_2/"] * (program is exits.forks_meanwhile) if commits else []
        assert committed(tmp_path / name) == steps, f"{name}\n{done.stderr}"
    assert "at the end of the program: step 1 was not saved" in done.stderr, "of the one that hangs, nobody else tells"


def test_two_ranks_whose_group_is_gone(tmp_path: Path) -> None:
    done = run(*TORCHRUN, "-m", "tests.faults.exits", str(tmp_path), exits.destroys_the_group_and_raises.__name__)
    assert done.returncode != 0
    assert "the loss of rank 1 is gone" in done.stderr
    assert "was not saved" not in done.stderr
    assert committed(tmp_path) == ["step_1/", "step_2/"]
