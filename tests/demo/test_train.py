"""launch/train.py, as a person runs it: alone and by the starter for one node, stopped and run again.

What is run alone once more is run by a process of the pool, without seconds of imports.
"""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "launch" / "train.py"
ALONE = (sys.executable, str(PROGRAM))
TWO_RANKS = ("bash", str(REPOSITORY / "launch/torchrun/one_node.sh"))


def train(start: tuple[str, ...], root: Path, last_step: int) -> list[str]:
    """The lines that it prints about its steps."""
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun, where there is no .venv
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS": "2", "PYTHONPATH": str(REPOSITORY), "PATH": beside}
    done = subprocess.run(
        [*start, str(root), str(last_step)], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return steps_in(done.stdout)


def train_here(rank: int, world_size: int, folder: Path, root: Path, last_step: int) -> list[str]:
    """The same, in a process that has imported all of it."""
    before = sys.argv
    sys.argv = [str(PROGRAM), str(root), str(last_step)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        sys.argv = before
    return steps_in(printed.getvalue())


def train_here_until(rank: int, world_size: int, folder: Path, root: Path, step: int) -> int:
    """The same, told to stop when it has saved that step; gives the status that it ends with."""

    def tell() -> None:
        while not (root / f"step_{step}/manifest.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    telling = threading.Thread(target=tell)
    telling.start()
    try:
        train_here(rank, world_size, folder, root, 10**7)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        telling.join()
    return 0


def steps_in(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("step ")]


def committed(root: Path) -> set[str]:
    return {record.parent.name for record in root.glob("step_*/manifest.json") if "." not in record.parent.name}


def test_alone_it_goes_on_where_it_stopped(ranks, tmp_path):
    first = train(ALONE, tmp_path, 40)
    assert [line.split()[1] for line in first] == ["20", "40"]
    assert committed(tmp_path) == {"step_20", "step_40"}
    (second,) = ranks.run(1, train_here, tmp_path, 100, backend=None)
    assert [line.split()[1] for line in second] == ["60", "80", "100"]
    assert all(line.endswith("(resumed at 40)") for line in second)
    assert len(committed(tmp_path)) <= 4  # the last three and the best one


@pytest.mark.larger
def test_two_ranks_start_and_one_goes_on(ranks, tmp_path):
    first = train(TWO_RANKS, tmp_path, 40)
    assert [line.split()[1] for line in first] == ["20", "40"]
    assert (tmp_path / "step_40" / "rank_1.pt").is_file()
    (second,) = ranks.run(1, train_here, tmp_path, 60, backend=None)
    assert [line.split()[1] for line in second] == ["60"]
    assert second[0].endswith("(resumed at 40)")


def test_told_to_stop_it_saves_that_step_and_is_not_finished(ranks, tmp_path):
    assert ranks.run(1, train_here_until, tmp_path, 40, backend=None) == [os.EX_TEMPFAIL]
    last = max(int(name[5:]) for name in committed(tmp_path))
    assert last >= 40
    (again,) = ranks.run(1, train_here, tmp_path, last + 20, backend=None)
    assert again[-1].endswith(f"(resumed at {last})")
