"""`ls`, `verify`, `repair`: what they print, how they end; places good, partial, damaged, foreign, empty, missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import shardckpt as sc
from shardckpt.cli.commands import app
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import RecordingStorage, flip_byte
from shardckpt.tools.listing import list_checkpoints
from tests.run.making import commit, start_attempt
from tests.storage.conftest import place, s3, seaweedfs
from tests.tools.making import save, small_state

__all__ = ["place", "s3", "seaweedfs"]  # fixtures

HAS = "  has model, optimizer, rng; without scheduler, data, progress, config"


def run(*arguments: object) -> tuple[int, str, str]:
    """Status, stdout, stderr; ids, times and rates as words."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    texts = [re.sub(r"[0-9a-f]{20}", "<id>", text) for text in (result.stdout, result.stderr)]
    lines = ["\n".join(line.rstrip() for line in text.splitlines()) for text in texts]
    return result.exit_code, re.sub(r"\d+ s\b", "<age>", lines[0]), lines[1]


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A place with a sound step."""
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"
    save(url, 7)
    return url


def test_a_good_run(url: str) -> None:
    assert run("verify", url) == (
        0,
        f"COMPLETE  step 7  2 files, 2.65 kB, 2.65 kB checked\n{HAS}",
        "",
    )
    status, told, said = run("ls", url)
    assert (status, said) == (0, "")
    head, line = told.splitlines()
    assert head.split() == ["step", "age", "size", "ranks", "score", "state", "parts"]
    assert re.fullmatch(r" +7  +(<age>|\d+ min)  2\.65 kB      1      -  committed  model, optimizer, rng", line)
    assert run("repair", url, "--step", 7) == (0, "step 7: nothing: the step is sound", "")


def test_json_has_all_that_the_text_has(url: str) -> None:
    status, told, _ = run("verify", url, "--json")
    report = json.loads(told)
    assert (status, report["ok"], report["quick"]) == (0, True, False)
    (step,) = report["steps"]
    assert (step["step"], step["verdict"], step["standing"], step["files"]) == (7, "COMPLETE", "committed", 2)
    assert step["parts"]["rng"] is True
    status, told, _ = run("ls", url, "--json")
    (line,) = json.loads(told)["steps"]
    assert (status, line["step"], line["state"], line["parts"]) == (0, 7, "committed", ["model", "optimizer", "rng"])
    assert line["nbytes"] == step["nbytes"]
    assert json.loads(run("repair", url, "--step", "7", "--json")[1])["kind"] == "nothing"


def test_a_damaged_run(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip_byte(tmp_path / "step_2/model.pt", -1)
    status, told, said = run("verify", tmp_path)
    assert (status, said) == (1, "damage was found; `shardckpt repair` says what can be done about it")
    assert told == (
        f"COMPLETE  step 1  2 files, 2.65 kB, 2.65 kB checked\n{HAS}\n"
        f"DAMAGED  step 2  2 files, 2.65 kB, 2.65 kB checked\n{HAS}\n"
        "  damaged: model.pt: its bytes are not those that were written, outside of all tensors: headers or padding"
    )
    assert run("verify", tmp_path, "--step", 1)[0] == 0
    assert run("verify", tmp_path, "--quick")[0] == 0
    status, told, said = run("repair", tmp_path, "--step", 2)
    assert (status, said) == (1, "nothing was changed; --apply does it")
    assert told.startswith("step 2: set aside (not done: a dry run): its files are damaged: model.pt")
    assert run("repair", tmp_path, "--step", 2, "--apply")[0] == 0
    status, told, _ = run("ls", tmp_path)
    assert told.splitlines()[2].split() == ["2", "-", "-", "-", "-", "set", "aside", "(damaged_step_2.<id>)"]
    assert run("verify", tmp_path)[0] == 0


def test_a_lost_record(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_1/manifest.json").unlink()
    status, told, _ = run("verify", tmp_path)
    assert (status, told.splitlines()[0]) == (
        0,
        "PARTIAL  step 1 (uncommitted: step_1)  2 files, 2.65 kB, 2.65 kB checked",
    )
    status, _, said = run("repair", tmp_path, "--step", 1)
    assert (status, "--ranks" in said) == (2, True)
    status, told, _ = run("repair", tmp_path, "--step", 1, "--ranks", 1, "--yes")
    assert (status, told.splitlines()[-1]) == (0, "  verify now says: COMPLETE")


def test_a_partial_step(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": small_state(1)["model"], "mine": 3}).result()
    status, told, _ = run("verify", tmp_path)
    assert (status, told.splitlines()) == (
        0,
        [
            "PARTIAL  step 1  2 files, 2.23 kB, 2.23 kB checked",
            "  has model; also mine; without optimizer, scheduler, rng, data, progress, config",
        ],
    )


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "model.bin")
    status, told, _ = run("verify", tmp_path)
    assert status == 0
    assert told.splitlines()[0].startswith("PARTIAL  files (foreign: .)  1 file, ")
    flip_byte(tmp_path / "model.bin", 2000)
    status, told, _ = run("verify", tmp_path)
    assert (status, "records whose bytes are not those of their CRC (data/0)" in told) == (1, True)


def test_runs_below_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, 12)
    (tmp_path / "b").mkdir()
    assert run("ls", tmp_path) == (0, "run  steps  latest\na        2      12", "")


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_places_where_nothing_is(tmp_path: Path, command: str) -> None:
    status, told, said = run(command, tmp_path / "none")
    assert (status, told, said) == (1, "", f"there is nothing at {tmp_path}/none")
    (tmp_path / "empty").mkdir()
    status, told, said = run(command, tmp_path / "empty")
    assert (status, told) == (0 if command == "ls" else 1, "")
    assert str(tmp_path / "empty") in said


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("repair", "--step", "1")])
@pytest.mark.parametrize("wrong", ["nonsense://a", "s3://user:secret@", "zip://a::file://b", ""])
def test_wrong_urls_give_a_message_and_show_no_secret(command: tuple[str, ...], wrong: str) -> None:
    status, told, said = run(*command, wrong)
    assert (status, told) == (2, "")
    assert said
    assert not {"secret", "Traceback"} & set(re.split(r"\W+", said))


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("repair", "--step", "1")])
@pytest.mark.parametrize(("error", "status"), [(PermissionError("not yours"), 2), (KeyboardInterrupt(), 130)])
def test_no_permission_and_ctrl_c_end_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], error: BaseException, status: int
) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(LocalStorage, "list" if command[0] != "repair" else "read", fail)
    ended, told, said = run(*command, tmp_path)
    assert (ended, told) == (status, "")
    assert len(said.splitlines()) <= 1
    assert ("not yours" in said) == (status == 2)


def test_a_step_costs_three_requests() -> None:
    """One for the root and one to look at it again for leftovers; the record's presence, the record, the score."""
    storage = MemoryStorage("run")
    count = 300  # of any number of steps
    for step in range(count):
        commit(storage, step)
    start_attempt(storage, count, "00000000aa")
    recording = RecordingStorage(storage)
    listing = list_checkpoints(recording)
    assert [line.step for line in listing.steps] == [*range(count), count]
    assert listing.steps[-1].state == "uncommitted"
    assert len(recording.operations) <= 3 * count + 4
    assert not [operation for operation in recording.operations if operation.name == "read_into"]


@pytest.mark.parametrize("arguments", [["ls"], ["verify", "--quick"], ["verify"]])
def test_looking_needs_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    save(tmp_path, 1)
    code = f"import sys; sys.argv = {['shardckpt', *arguments, str(tmp_path)]!r}\n" + (
        "from shardckpt.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'fsspec', 's3fs', 'yaml', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "shardckpt", "verify", str(tmp_path)]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    os.close(write)
    assert ended.stderr == ""


@pytest.mark.s3
def test_on_a_real_object_store(seaweedfs: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is that of other places; and a lost record comes back."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint)
    url = place(seaweedfs)
    save(url, 1, 7)
    assert run("verify", url, "--step", 7)[1] == f"COMPLETE  step 7  2 files, 2.65 kB, 2.65 kB checked\n{HAS}"
    assert run("ls", url)[1].splitlines()[2].split()[0] == "7"
    storage = seaweedfs.storage(url)
    storage.delete(["step_7/manifest.json"])
    assert run("verify", url, "--step", 7)[1].startswith("PARTIAL  step 7 (uncommitted: step_7/<id>)")
    assert run("repair", url, "--step", 7, "--apply")[0] == 0
    (key,) = [f"step_7/{n}" for n in storage.list("step_7") if n == "manifest.json"]
    storage.replace(key, storage.read(key)[:-1])
    status, told, _ = run("verify", url)
    assert (status, "damaged: manifest.json" in told) == (1, True)


def test_of_very_many_parts_only_some_are_named(tmp_path: Path) -> None:
    """A flat state of adapters has hundreds; JSON has all of them."""
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {f"p{number:03}": torch.ones(2) for number in range(300)}).result()
    for command in ("ls", "verify"):
        status, out, _ = run(command, tmp_path)
        assert status == 0
        assert "p000, p001" in out
        assert "p011 and 288 more" in out
        assert "p012" not in out
        assert "p299" in run(command, tmp_path, "--json")[1]
