"""Commands where things are not as they should be: places, permissions, interrupts, readers that go, terminals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from shardckpt.cli import output
from shardckpt.cli.output import print_table
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import flip_byte
from tests.cli.test_listing import run
from tests.tools.making import save

COMMANDS = {"cp": (), "doctor": ("--mb", "1"), "bench": ("--mb", "1"), "report": ("--to", "-")}


def arguments(command: str, url: object, other: object) -> list[object]:
    return [command, url, *([other] if command == "cp" else []), *COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", ["nonsense://a", "s3://user:secret@", "zip://a::file://b", ""])
def test_wrong_urls_give_a_message_and_show_no_secret(command: str, wrong: str, tmp_path: Path) -> None:
    status, told, said = run(*arguments(command, wrong, tmp_path / "to"))
    assert (status, told) == (2, "")
    assert said
    assert not {"secret", "Traceback"} & set(re.split(r"\W+", said))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("error", "status"), [(PermissionError("not yours"), 2), (KeyboardInterrupt(), 130)])
def test_no_permission_and_ctrl_c_end_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: BaseException, status: int
) -> None:
    save(tmp_path / "run", 1)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "list" if command == "report" else "put", fail)
        ended, told, said = run(*arguments(command, tmp_path / "run", tmp_path / "to"))
    assert (ended, told) == (status, "")
    assert len(said.splitlines()) <= 1
    assert ("not yours" in said) == (status == 2)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.relative_to(tmp_path).parts[0] == "run"] == before


def test_what_is_no_run_of_ours_is_not_copied(tmp_path: Path) -> None:
    to, run_ = tmp_path / "to", tmp_path / "run"
    (tmp_path / "empty").mkdir()
    assert run("cp", tmp_path / "empty", to) == (1, "", f"there is no committed step in {tmp_path}/empty")
    (tmp_path / "foreign").mkdir()
    torch.save({"weight": torch.zeros(10)}, tmp_path / "foreign/model.bin")
    assert run("cp", tmp_path / "foreign", to)[:2] == (1, "")
    assert run("cp", tmp_path / "foreign/model.bin", to)[:2] == (1, "")
    save(run_, 1, 2)
    (run_ / "step_2/manifest.json").unlink()
    status, told, _ = run("cp", run_, to, "--all")
    assert (status, told.count("\n"), told.startswith("step 1: copied")) == (0, 0, True)
    assert run("cp", run_, to, "--step", 2)[:2] == (1, "")
    flip_byte(run_ / "step_1/manifest.json", 30)
    status, told, said = run("cp", run_, tmp_path / "other")
    assert (status, told, "the record of step 1 is damaged" in said) == (1, "step 1: damaged", True)
    assert not (tmp_path / "other").exists()


def test_the_page_of_a_damaged_run(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip_byte(tmp_path / "step_2/manifest.json", 30)
    (tmp_path / "saves.jsonl").write_bytes(b"\xff\x00 no log\n")
    status, told, said = run("report", tmp_path, "--to", "-")
    assert (status, said) == (0, "")
    assert "damaged record (step_2)" in told
    assert "Space by part, step 1" in told


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for command in (["ls"], ["report", "--to", "-"]):
        read, write = os.pipe()
        os.close(read)
        full = [sys.executable, "-m", "shardckpt", *command, str(tmp_path)]
        ended = subprocess.run(full, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
        os.close(write)
        assert ended.stderr == ""


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_nothing_is_wider_than_it(tmp_path: Path, columns: int) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_2").mkdir()
    (tmp_path / f"damaged_step_1.{'0' * 60}").mkdir()
    shown = on_terminal(["ls", str(tmp_path)], columns, {"NO_COLOR": "1"} if columns == 80 else {})
    assert "\x1b[1m" in shown  # the heads are bold, which is no colour
    assert not re.search(r"\x1b\[[\d;]*3\dm", shown)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    lines = plain.splitlines()
    assert max(map(len, lines)) <= columns
    assert (len(lines) > 4) == (columns == 80)  # what is too wide is folded
    assert "model, optimizer" in plain


def on_terminal(command: list[str], columns: int, environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")}
    full = [sys.executable, "-m", "shardckpt", *command]
    process = subprocess.Popen(
        full, stdout=theirs, stderr=theirs, env={**known, "TERM": "xterm-256color", **environment}
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # once the other side is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(100) == 0
    return shown.decode()


def test_long_tables_are_not_laid_out_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    rows = [(str(number), "x") for number in range(10_000)]

    def never() -> None:
        raise AssertionError("rich takes seconds for this")

    monkeypatch.setattr(output, "console", never)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table({"step": "right", "what": "left"}, rows)
    told = capsys.readouterr().out.splitlines()
    assert (len(told), told[0], told[1], told[-1]) == (10_001, "step  what", "   0  x", "9999  x")
