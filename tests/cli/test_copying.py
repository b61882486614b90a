"""`cp`: what it prints and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from shardckpt.cli import output
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import flip_byte
from tests.cli.test_listing import run
from tests.tools.making import assert_loads, save


def copied(*arguments: object) -> tuple[int, str, str]:
    status, told, said = run("cp", *arguments)
    return status, re.sub(r"[\d.]+ .?B/s", "<rate>", told), said


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_copy_and_what_is_there_already(tmp_path: Path, kind: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there" if kind == "local" else f"memory://{tmp_path.name}-there"
    save(here, 1, 7)
    assert copied(here, there) == (0, "step 7: copied, 2 files, 2.65 kB, <rate>", "")
    told = "step 1: copied, 2 files, 2.65 kB, <rate>\nstep 7: already there, 2 files, 2.65 kB"
    assert copied(here, there, "--all") == (0, told, "")
    assert_loads(there, 7)
    status, told, _ = run("cp", here, there, "--step", 1, "--json")
    report = json.loads(told)
    assert (status, report["ok"], report["target"]) == (0, True, str(there))
    assert report["steps"][0]["outcome"] == "already there"


def test_damaged_and_other_steps(tmp_path: Path) -> None:
    save(tmp_path / "here", 1, 2)
    save(tmp_path / "there", 1)
    flip_byte(tmp_path / "here/step_2/model.pt", 0)
    status, told, said = copied(tmp_path / "here", tmp_path / "there", "--all")
    assert (status, told) == (1, "step 1: another is there, 2 files, 2.65 kB\nstep 2: damaged")
    assert "it was not touched" in said
    assert "step_2/model.pt" in said


def test_wrong_usage_and_places(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    assert copied(tmp_path / "none", tmp_path / "to") == (1, "", f"there is nothing at {tmp_path}/none")
    assert copied(tmp_path / "run", tmp_path / "to", "--step", 9)[0] == 1
    assert copied(tmp_path / "run", tmp_path / "to", "--step", 1, "--all")[0] == 2
    assert copied(tmp_path / "run", "nonsense://to")[0] == 2
    assert copied(tmp_path / "run", tmp_path / "step_1")[0] == 2
    assert run("cp", tmp_path / "run")[0] == 2
    assert not (tmp_path / "to").exists()
    (tmp_path / "file").write_text("x")
    status, told, said = copied(tmp_path / "run", tmp_path / "file")
    assert (status, told, "the same command goes on" in said) == (2, "", True)


def test_ctrl_c_in_the_middle_and_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    save(here, 1)
    put = LocalStorage.put

    def interrupted(self: LocalStorage, key: str, parts: Any) -> int:
        if key.endswith("rank_0.pt"):
            raise KeyboardInterrupt
        return put(self, key, parts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", interrupted)
        status, told, said = copied(here, there)
    assert (status, told, "Traceback" in said) == (130, "", False)
    assert run("ls", there)[1].splitlines()[1].split()[-2] == "uncommitted"
    status, told, _ = copied(here, there)
    assert (status, told.startswith("step 1: copied, 2 files, 2.65 kB")) == (0, True)
    assert_loads(there, 1)


def test_a_bar_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with output.progress("step") as bar:
        bar(1, 5, 10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(output, "MOMENT_S", 60.0)
    with output.progress("step") as bar:
        bar(1, 10, 10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(output, "MOMENT_S", -1.0)
    gone: list[int] = []
    plain = Progress.remove_task
    monkeypatch.setattr(Progress, "remove_task", lambda bar, task: (gone.append(task), plain(bar, task)))
    with output.progress("step") as bar:
        for step in (1, 2, 3):
            bar(step, 5, 10)
            bar(step, 5, 10)
    told, said = capsys.readouterr()
    assert (told, "step 3" in said) == ("", True)
    assert gone == [0, 1]  # of many steps, one line stands there
