"""`doctor`, `bench`, `report`: what they print and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardckpt.cli.main import app
from shardckpt.tools.examining import place
from tests.cli.test_looking import run


def as_json(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_doctor_tells_of_a_place(tmp_path: Path) -> None:
    status, told, said = run("doctor", tmp_path / "run", "--mb", 1)
    assert (status, said, list(tmp_path.iterdir())) == (0, "", [])
    lines = told.splitlines()
    assert "ok       write once: what is there is not created again" in lines
    assert any(line.startswith("ok       rate of a write: ") for line in lines)
    assert all(line[:9].strip() in ("ok", "note", "") for line in lines)
    found = as_json("doctor", tmp_path, "--mb", 1)
    assert (found["ok"], found["url"]) == (True, str(tmp_path))
    assert {"name", "level", "what", "advice", "value", "unit"} == set(found["findings"][0])


def test_doctor_of_the_machine_alone() -> None:
    status, told, _ = run("doctor")
    assert (status, "memory: " in told, "write once" in told) == (0, True, False)


def test_doctor_ends_with_1_for_problems_and_2_for_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    status, told, said = run("doctor", tmp_path / "file/run")
    assert (status, told, said.startswith("shardckpt: cannot write to")) == (2, "", True)
    assert run("doctor", "nonsense://a")[0] == 2
    monkeypatch.setattr(place, "_SKEW_S", -1.0)
    monkeypatch.setattr(place, "_REFUSED_S", -1.0)
    status, told, said = run("doctor", f"memory://{tmp_path.name}", "--mb", 1)
    assert status == 0  # that place has no clock of its own
    status, told, said = run("doctor", tmp_path, "--mb", 1)
    assert (status, "problem  clock: " in told, said) == (1, True, "there are problems; see above")
