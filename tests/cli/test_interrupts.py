"""Ctrl-C anywhere in any command: no traceback, status 130, no committed step harmed, and the command again works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import shardckpt as sc
from shardckpt.storage.local import LocalStorage
from tests.cli.shown import commands
from tests.cli.test_listing import run
from tests.scorecard import Scale, Scorecard
from tests.tools.making import assert_loads, save

COMMANDS = {command[0]: command for command in commands("sound")} | {
    "prune": ["prune", "<run>", "--keep-last", "1", "--apply"],
    "repair": ["repair", "<run>", "--step", "5", "--apply", "--ranks", "1"],
    "report": ["report", "<run>", "--to", "<to>.html"],
}
OPERATIONS = (
    *("put", "replace", "put_range", "read", "read_into", "size", "list", "delete", "delete_tree", "lend"),
    *("make_folder", "sync_folder", "rename_folder", "exchange_folders", "link", "read_link"),
)


class Interrupt:
    """Presses Ctrl-C at the n-th call of a storage in the main thread, where alone Python heeds it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, nth: int | None) -> None:
        self.seen = 0
        self._nth = nth
        for name in OPERATIONS:
            patch.setattr(LocalStorage, name, self._watched(getattr(LocalStorage, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                self.seen += 1
                if self.seen == self._nth:
                    raise KeyboardInterrupt
            return call(*arguments, **options)

        return watched


def stage(folder: Path) -> list[Path]:
    """A run with two sound steps and one that has lost its record."""
    save(folder / "run", 1, 7, 5)
    (folder / "run/step_5/manifest.json").unlink()
    return [folder / "run", folder / "out"]


def words(name: str, run_: Path, to: Path) -> list[str]:
    return [word.replace("<run>", str(run_)).replace("<to>", str(to)) for word in COMMANDS[name]]


def assert_unharmed(root: Path, name: str) -> None:
    """Each step that is there is whole; only `prune` may have taken one away, and only `repair` brought one."""
    report = sc.verify(root)
    assert report.ok, report
    there = {step.step for step in report.steps if step.standing == "committed"}
    assert {7} | ({1} if name != "prune" else set()) <= there <= {1, 7} | ({5} if name == "repair" else set())
    for step in there:
        assert_loads(root, step)


@pytest.mark.parametrize("name", COMMANDS)
def test_in_the_middle_of_every_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale
) -> None:
    original, _ = stage(tmp_path / "original")

    def copy(number: int) -> tuple[Path, Path]:
        folder = tmp_path / str(number)
        shutil.copytree(original, folder / "run")
        return folder / "run", folder / "out"

    run_, to = copy(0)
    with monkeypatch.context() as patch:
        counted = Interrupt(patch, nth=None)
        status, _, _ = run(*words(name, run_, to))
    count = counted.seen
    places = random.Random(name).sample(range(1, count + 1), min(scale.runs(sample=3, full=10_000), count))
    for nth in places:
        run_, to = copy(nth)
        with monkeypatch.context() as patch:
            Interrupt(patch, nth=nth)
            ended, _, said = run(*words(name, run_, to))
        assert (ended, said) == (130, ""), nth
        assert_unharmed(run_, name)
        assert run(*words(name, run_, to))[0] == status, nth  # what was left behind is in nobody's way
        assert_unharmed(run_, name)


PRESSED = """
import os, runpy, signal, sys
left = int(sys.argv.pop(1))
class Pressing:
    def find_spec(self, name, path=None, target=None):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGINT)
import shardckpt.cli.main  # what comes before that is Python's
sys.meta_path.insert(0, Pressing())
sys.argv[0] = "shardckpt"
sys.exit(shardckpt.cli.main.main())
"""


BEGUN = """
import sys
from shardckpt.cli.main import main
print("begun", file=sys.stderr, flush=True)
sys.argv[0] = "shardckpt"
main()
"""
QUICK = {"ls", "verify", "pin", "unpin", "prune", "runs", "report"}
"""Those that need no torch."""


@pytest.mark.parametrize("nth", [1, 30, 150])
def test_while_it_starts(tmp_path: Path, nth: int) -> None:
    """At the n-th import after its first line: of Ctrl-C in its first tenth of a second nothing is to be seen."""
    save(tmp_path, 1)
    command = [sys.executable, "-c", PRESSED, str(nth), "ls", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")


@pytest.mark.crash
def test_at_any_moment(tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    """Real processes and a real signal, whenever it comes."""
    original, _ = stage(tmp_path / "original")
    dice, interrupted = random.Random(os.urandom(4)), 0
    trials = scale.runs(sample=3, full=400)
    for trial in range(trials):
        name = dice.choice(sorted(COMMANDS))
        folder = tmp_path / str(trial)
        shutil.copytree(original, folder / "run")
        command = [sys.executable, "-c", BEGUN, *words(name, folder / "run", folder / "out")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "begun\n"  # what comes before that is Python's
            time.sleep(dice.uniform(0, 0.4 if name in QUICK else 3))
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=100)[1]
        interrupted += process.returncode == 130
        assert process.returncode in (0, 1, 130), (name, said)
        assert "Traceback" not in said, (name, said)
        assert_unharmed(folder / "run", name)
        shutil.rmtree(folder)
    scorecard.add("Ctrl-C in commands", runs=trials, notes=f"{interrupted} ended with 130, the others were faster")


@pytest.mark.larger
@pytest.mark.slow
def test_in_the_middle_of_the_demo(tmp_path: Path) -> None:
    """Once its ranks have been started: all of them are ended."""
    choices = ["--mesh", "1x1", "--others", "none", "--size", "tiny", "--root", str(tmp_path)]
    command = [sys.executable, "-m", "shardckpt", "demo", *choices]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("checkpoints in ")
        ranks, until = list[psutil.Process](), time.monotonic() + 60
        while not ranks:
            assert time.monotonic() < until
            ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
    assert (process.returncode, said) == (130, "\nshardckpt demo: interrupted; all ranks were ended\n")
    assert not any(rank.is_running() for rank in ranks)


ENDING = """
import os, signal, sys
from shardckpt.cli.main import main
class Late:
    def __del__(self):  # when Python takes its modules apart, and all handlers are gone
        os.kill(os.getpid(), signal.SIGINT)
sys.modules["late"] = Late()
sys.argv[0] = "shardckpt"
main()
"""


def test_when_all_is_done_it_ends_as_if_nothing_had_been_pressed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    command = [sys.executable, "-c", ENDING, "ls", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
