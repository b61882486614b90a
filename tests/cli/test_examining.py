"""`doctor`, `bench`, `report`: what they print and how they end."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardckpt.cli.commands import app
from shardckpt.storage.open import open_storage
from shardckpt.tools.examining import place
from tests.cli.test_listing import run
from tests.tools.making import save


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


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_bench_measures_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "not/there") if kind == "local" else f"memory://{tmp_path.name}-bench"
    status, told, said = run("bench", url, "--mb", 1, "--rounds", 1)
    assert (status, said) == (0, "")
    rows = [line.split("  ")[0] for line in told.splitlines()]
    assert rows == ["what", "plain write", "save", "plain read", "load"]
    found = as_json("bench", url, "--mb", 1, "--rounds", 2)
    assert (found["nbytes"], [len(measure["seconds"]) for measure in found["measures"]]) == (1_000_000, [2] * 4)
    assert [measure["ratio"] is None for measure in found["measures"]] == [True, False] * 2
    assert list(tmp_path.iterdir()) == []
    with closing(open_storage(url)) as storage:
        assert storage.list() == []


def test_bench_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    status, told, said = run("bench", tmp_path / "file/run", "--mb", 1)
    assert (status, told, said.startswith("shardckpt: cannot write to")) == (2, "", True)


def test_report_writes_a_page(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 2)
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "run", "--to", page, "--keep-last", 1, "--keep-best", 2) == (
        0,
        "",
        f"{page} has been written",
    )
    assert "not kept by any rule" in page.read_text()
    status, told, said = run("report", tmp_path / "run", "--to", "-")
    assert (status, told.splitlines()[0], said) == (0, "<!doctype html>", "")
    found = as_json("report", tmp_path / "run")
    assert ([step["step"] for step in found["steps"]], found["log"], found["saves"]) == ([1, 2], None, [])
    assert run("report", tmp_path / "none")[0] == 1
    status, _, said = run("report", tmp_path / "run", "--to", tmp_path / "none/page.html")
    assert (status, "page.html" in said) == (2, True)
