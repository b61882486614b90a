"""A program that does not close its gangs ends well: no thread comes back from C++ when there is no Python any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gang.unclosed import PROGRAMS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_nobody_closed(name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.gang.unclosed", name]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=100, cwd=REPOSITORY, check=False
    )
    assert ended.returncode == 0, f"{ended.returncode}\n{ended.stderr}"
    assert ended.stdout == ("left: []\n" if name == "links" else "")
