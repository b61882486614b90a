"""An error that no restart mends ends torchrun as well; any other leaves it its restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSaveError,
    Failure,
    GangError,
    InvalidStateError,
    RootNotSharedError,
)
from shardckpt.integrations import torchrun
from tests.house.source import ROOT


def failed(*kinds: str, absent: tuple[int, ...] = ()) -> GangError:
    failures = {rank: Failure(rank, kind, "it is so") for rank, kind in enumerate(kinds)}
    return GangError("write failed", failures=failures, absent=absent)


def not_saved(cause: GangError) -> CheckpointError:
    error = CheckpointSaveError("step 1 was not saved")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RootNotSharedError("two disks"), True),
        (CheckpointMismatchError("another model"), True),
        (InvalidStateError("a lambda"), True),
        (ModuleNotFoundError("s3fs"), True),
        (failed("InvalidStateError"), True),
        (not_saved(failed("FileNotFoundError", "FileNotFoundError")), True),
        (not_saved(failed("FileNotFoundError", "ConnectionError")), False),
        (not_saved(failed("PermissionError")), False),
        (not_saved(failed("FileNotFoundError", absent=(1,))), False),
        (not_saved(failed("TimeoutError")), False),
        (failed(absent=(1,)), False),
        (CheckpointSaveError("the deadline"), False),
        (CheckpointDamagedError("bytes"), False),
        (FileNotFoundError("a file of the data set"), False),
        (RuntimeError("CUDA"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_which_errors_no_restart_mends(error: BaseException, expected: bool) -> None:
    assert torchrun.is_permanent(error) == expected


def test_what_the_engine_raises_for_a_folder_that_cannot_be_made_is_one() -> None:
    with sc.CheckpointManager("/proc/nowhere") as checkpoints:
        checkpoints.save(1, {"step": 1})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
    assert torchrun.is_permanent(caught.value)


def processes(folder: Path, *above: tuple[str, dict[str, str]]) -> Path:
    """A /proc in which this process is the last: those above it, the first on top, command and environment of each."""
    numbers = [*range(1, len(above) + 1), os.getpid()]
    for number, parent, (command, environment) in zip(numbers, [0, *numbers], [*above, ("python", {})], strict=False):
        place = folder / str(number)
        place.mkdir()
        (place / "stat").write_text(f"{number} (a ) R 7 (b)) S {parent} 1 1\n")
        (place / "environ").write_text("".join(f"{name}={value}\0" for name, value in environment.items()))
        (place / "cmdline").write_text(command.replace(" ", "\0"))
    return folder


def test_torchrun_is_found_above_what_it_starts(tmp_path: Path) -> None:
    ours = {"A": "b", "TORCHELASTIC_RUN_ID": "train"}
    nothing: dict[str, str] = {}
    shell, wrapper = ("bash start.sh", nothing), ("numactl python train.py", ours)

    def found(name: str, *above: tuple[str, dict[str, str]]) -> int | None:
        place = tmp_path / name
        place.mkdir()
        return torchrun._agent(processes(place, *above))

    assert found("as a module", shell, ("python -m torch.distributed.run train.py", {})) == 2
    assert found("with a wrapper", ("/usr/bin/torchrun train.py", {"A": "b"}), wrapper) == 1
    assert found("something else", shell, ("python scheduler.py", {}), wrapper) is None
    assert found("all of them its own", wrapper, wrapper) is None
    assert torchrun._agent(tmp_path / "no such place") is None


def test_it_is_told_once_the_error_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    shown: list[BaseException] = []
    monkeypatch.setattr(os, "kill", lambda *what: told.append(what))
    monkeypatch.setattr(torchrun, "_agent", lambda: 17)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(error))
    torchrun.end_torchrun_if_hopeless(note=tmp_path / "note")

    def end_by(error: BaseException) -> None:
        sys.excepthook(type(error), error, None)

    end_by(RootNotSharedError("two disks"))  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "train")
    end_by(RuntimeError("CUDA"))
    assert (len(shown), told, (tmp_path / "note").exists()) == (2, [], False)
    end_by(RootNotSharedError("two disks"))
    assert (len(shown), told) == (3, [(17, signal.SIGTERM)])
    assert (tmp_path / "note").read_text() == "RootNotSharedError: two disks\n"


@pytest.mark.larger
@pytest.mark.timeout(300)
def test_torchrun_ends_at_once(tmp_path: Path) -> None:
    """With two ranks, and a hundred restarts: by the starter's program, of which there is one life."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=100",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GIVEN_UP": str(tmp_path / "note"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "launch/train.py"), "/proc/nowhere/run", "200"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot make the folder" in (tmp_path / "note").read_text()
    assert "is told to end" in done.stderr
    assert done.stdout.count("step 20 loss") == 1, done.stdout
    assert "(resumed" not in done.stdout
