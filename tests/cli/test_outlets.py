"""What a command does when nobody reads what it says: all of its work, the status that it would have had, no word more.

Every command of the table of golden outputs, in this process, with its own descriptors 1 and 2; and some as processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardckpt.cli import main as entry
from shardckpt.cli.outlets import _stream
from tests.cli.shown import WITHOUT_JSON, Stage, commands, golden, staged
from tests.cli.test_listing import run
from tests.scorecard import Scale
from tests.tools.making import save


def expected() -> dict[str, tuple[int, bool, list[str]]]:
    """Of each command on a sound run: its status, whether it prints data, and what it says."""
    found = {}
    for text in golden("local", "sound").read_text().removeprefix("$").split("\n\n$"):
        words, *lines = text.strip("\n").split("\n")
        if "--json" not in words.split():
            data = any(not line.startswith(("! ", "= ")) for line in lines)
            said = [line.removeprefix("! ") for line in lines if line.startswith("! ")]
            ended = lines[-1].removeprefix("= ").replace("<n>", "0")  # of doctor and bench: numbers of the machine
            found[words.split()[1]] = (int(ended), data, said)
    return found


def broken() -> int:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


WAYS: dict[str, tuple[Callable[[], int] | None, bool]] = {
    "its reader has gone": (broken, False),
    "it is closed": (None, False),
    "the disk is full": (full, False),
    "that of stderr, too": (broken, True),
}
"""What stdout is, None if closed; and whether stderr is the same."""


@contextmanager
def standing(number: int, make: Callable[[], int] | None) -> Iterator[None]:
    """This descriptor of the process is that meanwhile."""
    saved = os.dup(number)
    try:
        if make is None:
            os.close(number)
        else:
            other = make()
            os.dup2(other, number)
            os.close(other)
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


def ended(patch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """Run it from its entry point, as a process would."""
    for name, value in (("stdout", sys.stdout), ("stderr", sys.stderr), ("argv", ["shardckpt", *arguments])):
        patch.setattr(sys, name, value)
    patch.setattr(entry, "_leave_at_once", lambda: False)
    patch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as told:
        entry.main()
    sys.stdout.flush()
    return int(told.value.code or 0)


@pytest.mark.parametrize("way", WAYS)
def test_every_command(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale) -> None:
    known, one_in, turn = expected(), max(1, 6 // scale.runs(sample=1, full=6)), list(WAYS).index(way)
    make, also_stderr = WAYS[way]
    tried = []
    with staged("local", "sound", tmp_path / "place", None) as stage:
        for number, command in enumerate(commands("sound")):
            if command[0] in WITHOUT_JSON or (number + turn) % one_in == 0:
                status, data, said = known[command[0]]
                words = [*arguments(command, stage)]
                errors = tmp_path / "stderr"

                def kept(errors: Path = errors) -> int:
                    return os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)

                with monkeypatch.context() as patch, standing(1, make), standing(2, make if also_stderr else kept):
                    got = ended(patch, words)
                lost = way == "the disk is full" and data
                assert got == (2 if lost else status) or (command[0] == "doctor" and got == 1), command
                if not also_stderr:
                    lines = errors.read_text().splitlines()
                    assert "Traceback" not in "".join(lines)
                    full_disk = ["shardckpt: cannot write to stdout: No space left on device"]
                    assert lines[-1:] == full_disk if lost else len(lines) == len(said), (command, lines)
                tried.append(command[0])
    assert len(tried) >= (4 if one_in > 1 else 15)


def arguments(command: list[str], stage: Stage) -> Iterator[str]:
    for word in [*command, *(["--to", "<page>"] if command[0] == "report" else [])]:
        yield word.replace("<run>", stage.url).replace("<to>", stage.to).replace("<page>", str(stage.page))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "| head -n 0"])
def test_of_a_process(tmp_path: Path, redirected: str) -> None:
    """Python itself flushes at the end, and opens nothing in the place of what is closed."""
    save(tmp_path, 1)
    command = f'"$@" {redirected}'
    shell = ["bash", "-o", "pipefail", "-c", command, "-", sys.executable, "-m", "shardckpt", "ls", str(tmp_path)]
    ended = subprocess.run(shell, capture_output=True, text=True, timeout=100, check=False)
    is_full = redirected == "> /dev/full"
    assert ended.returncode == (2 if is_full else 0), ended
    assert ended.stderr == "shardckpt: cannot write to stdout: No space left on device\n" * is_full
    assert ("committed" in ended.stdout) == (redirected == "2>&-")


@pytest.mark.parametrize("arguments", [["report", "--to", "-"], ["--help"], ["demo", "--help"], ["nonsense"]])
@pytest.mark.sampled(2)
def test_what_is_printed_by_others_than_commands(tmp_path: Path, arguments: list[str]) -> None:
    save(tmp_path, 1)
    command = [sys.executable, "-m", "shardckpt", *arguments, *([str(tmp_path)] if "report" in arguments else [])]
    pipe = broken()
    ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    os.close(pipe)
    assert ended.returncode == (2 if arguments == ["nonsense"] else 0)
    assert (ended.stderr == "") == (arguments != ["nonsense"])


def test_a_name_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = _stream(file, file.fileno(), "stdout")
        stream.write("step_\udcff \u2014\n")
        stream.flush()
        stream.detach()
    assert (tmp_path / "out").read_text() == "step_\\udcff \\u2014\n"


def test_what_the_storage_says_of_a_broken_pipe_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that broke is no reader that went away."""

    def fail(*_: object) -> None:
        raise BrokenPipeError(32, "the server has closed the connection")

    save(tmp_path, 1)
    monkeypatch.setattr("shardckpt.storage.local.LocalStorage.list", fail)
    status, told, said = run("prune", tmp_path, "--keep-last", 1)
    assert (status, told, "the server has closed" in said) == (2, "", True)
