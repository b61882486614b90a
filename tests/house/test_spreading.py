"""The order of the tests under xdist: mixed, the same on all workers, and what is shared is made once."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.house.source import ROOT

SHARING = """
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def shared(request):
    with (Path(request.config.rootpath) / "made").open("a") as file:
        file.write("made\\n")

@pytest.mark.parametrize("n", range(8))
def test_shared(shared, n):
    pass
"""
ALONE = """
import pytest

@pytest.mark.parametrize("n", range(8))
def test_alone(n):
    pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(8))
def test_slow(n):
    pass
"""


def run(folder: Path, *arguments: str) -> list[str]:
    """The tests, in the order in which they were done."""
    (folder / "conftest.py").write_text("pytest_plugins = ['tests.spreading']\n")
    (folder / "test_a.py").write_text(ALONE)
    (folder / "test_b.py").write_text(SHARING)
    (folder / "test_c.py").write_text(ALONE)
    options = ["--dist=loadgroup", "-p", "no:cacheprovider", f"-opythonpath={ROOT}", "-omarkers=slow"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *options, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    words = [word.partition("@")[0] for line in done.stdout.splitlines() if "PASSED" in line for word in line.split()]
    return [word for word in words if "::" in word]


def test_workers_mix_files_and_what_a_module_shares_is_made_once(tmp_path: Path) -> None:
    done = run(tmp_path, "-n", "3")
    assert len(set(done)) == 40
    assert sum(one[:7] != other[:7] for one, other in pairwise(done)) > 8
    assert (tmp_path / "made").read_text() == "made\n"


def test_alone_the_order_is_that_of_the_names(tmp_path: Path) -> None:
    assert [test[:6] for test in run(tmp_path, "-n", "0")] == ["test_a"] * 16 + ["test_b"] * 8 + ["test_c"] * 16
