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
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardckpt.cli import output
from shardckpt.cli.output import print_table
from shardckpt.format.manifest import decode_manifest, encode_manifest
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import flip_byte
from tests.cli.test_listing import run
from tests.scorecard import Scale
from tests.tools.making import save

COMMANDS: dict[str, tuple[str, ...]] = {
    "cp": (),
    "doctor": ("--mb", "1"),
    "bench": ("--mb", "1"),
    "report": ("--to", "-"),
    "inspect": (),
    "plan": ("--mesh", "dp=2"),
    "diff": (),
    "convert": (),
    "export": (),
    "average": (),
    "merge-lora": (),
    "runs": (),
    "prune": ("--keep-last", "1", "--apply"),
    "pin": ("--step", "1"),
    "unpin": ("--step", "1"),
}
"""Those that `test_listing` does not have."""
WRITES = {"put": ("cp", "doctor", "bench"), "replace": ("pin",), "delete": ("unpin",)}
"""What is refused to some; to the others, a look at what is there."""


def arguments(command: str, url: object, other: object) -> list[object]:
    to = {"cp": [other], "convert": [other], "export": [other], "average": [url, other], "diff": [url]}
    to["merge-lora"] = [other]
    return [command, url, *to.get(command, []), *COMMANDS[command]]


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
        refused = next((name for name, those in WRITES.items() if command in those), "list")
        patch.setattr(LocalStorage, refused, fail)
        ended, told, said = run(*arguments(command, tmp_path / "run", tmp_path / "to"))
    assert (ended, told) == (status, "")
    assert len(said.splitlines()) <= 1
    assert ("not yours" in said) == (status == 2)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.relative_to(tmp_path).parts[0] == "run"] == before


@pytest.mark.parametrize("command", COMMANDS)
def test_empty_folders_and_none(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("empty", "none"):
        status, _, said = run(*arguments(command, tmp_path / place, tmp_path / "to"))
        assert status in ((0,) if command in ("doctor", "bench") else (0, 1)), said
        assert "Traceback" not in said
        assert not (tmp_path / "to").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_many_steps(tmp_path: Path, scale: Scale) -> None:
    """Ten thousand of them, in a full run: quick, and each is told of."""
    count = scale.runs(sample=300, full=10_000)
    save(tmp_path, 0)
    files = {path.name: path.read_bytes() for path in (tmp_path / "step_0").iterdir()}
    first = decode_manifest(files["manifest.json"])
    for step in range(1, count):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        for name, content in files.items():
            record = encode_manifest(replace(first, step=step))
            (folder / name).write_bytes(record if name == "manifest.json" else content)
    began = time.monotonic()
    for command in (["ls"], ["prune", "--keep-last", 1], ["report", "--to", "-"], ["verify", "--quick"], ["inspect"]):
        status, told, said = run(command[0], tmp_path, *command[1:])
        assert status == (command[0] == "prune"), said
        assert command[0] == "inspect" or told.count(f"{count - 1}") >= 1
        assert command[0] not in ("ls", "prune", "verify") or told.count("\n") >= count - 1
    assert time.monotonic() - began < 120


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
