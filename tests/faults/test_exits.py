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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


def committed(root: Path) -> list[str]:
    """The steps; nothing of an attempt that did not become one may be left but what a hung writer still holds."""
    return sorted(name for name in LocalStorage(root).list() if name.endswith("/") and ".tmp" not in name)


def test_it_ends_and_leaves_a_checkpoint_or_none(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.faults.exits", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    for program, (status, commits) in exits.ALONE.items():
        name = program.__name__
        assert ended[name] == status, f"{name}\n{done.stderr}"
        steps = ["step_1/"] + ["step_2/"] * (program is exits.forks_meanwhile) if commits else []
        assert committed(tmp_path / name) == steps, f"{name}\n{done.stderr}"
    # Of the one that hangs, nobody else tells; all others are saved.
    assert (
        done.stderr.count("was not saved") == done.stderr.count("at the end of the program: step 1 was not saved") == 1
    )
    # Two ranks, whose group was gone when they saved.
    name = exits.destroys_the_group_and_raises.__name__
    assert [ended[f"{name} {rank}"] for rank in range(2)] == [0, 1], done.stderr
    assert "the loss of rank 1 is gone" in done.stderr
    assert committed(tmp_path / name) == ["step_1/", "step_2/"], done.stderr
