"""The whole command on a tiny state: what it writes, and that every number in it stands on a verified load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.engines import ENGINES, Entry, TorchSave
from benchmarks.job import Task, WrongContentError, measure
from benchmarks.job import main as job_main
from benchmarks.limits import LIMITS
from benchmarks.report import Spread
from benchmarks.rounds import JobFailedError, Results
from benchmarks.states import Shape, make

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--gb", "0", "--layers", "1", "--count", "20", "--tokens", "8", "--rounds", "1", "--saves", "2"]


IN_PROCESS = [name for name, entry in ENGINES.items() if not entry.missing and "process" not in name]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs do what they do in a process of their own, without four seconds of imports for each."""

    def run_job(task: Task, ranks: int, folder: Path) -> dict[str, Any]:
        assert ranks == 1
        file = folder / "task.json"
        file.write_text(task.encode())
        job_main(file)
        values: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return values

    monkeypatch.setattr("benchmarks.rounds.run_job", run_job)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("state", ["A", "B"])
def test_every_measure_of_every_engine_is_verified(
    tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    arguments = ["--state", state, "--engines", *IN_PROCESS, "--root", str(tmp_path), "--json", str(file)]
    assert main([*TINY, *arguments]) == 0
    results = Results.decode(file.read_text())
    taken = {(sample.engine, sample.measure): sample.values for sample in results.samples}
    expected = {(engine, measure) for engine in IN_PROCESS for measure in ENGINES[engine].measures}
    assert set(taken) == expected | {("limits", "limits")}
    assert not results.failed
    assert all(taken[key]["verified"] for key in expected)
    assert set(taken["limits", "limits"]) == set(LIMITS)
    assert all(rate > 0 for rate in taken["limits", "limits"].values())
    for key in expected - {(engine, "stall") for engine in IN_PROCESS}:
        assert all(seconds > 0 for seconds in taken[key]["seconds"])
    for engine in (engine for engine in IN_PROCESS if "save" in ENGINES[engine].measures):
        assert taken[engine, "save"]["file_nbytes"] > taken[engine, "save"]["state_nbytes"] > 0
    for engine in (engine for engine in IN_PROCESS if "stall" in ENGINES[engine].measures):
        assert taken[engine, "stall"]["stall_s"][0] >= taken[engine, "stall"]["blocked_s"][0] > 0
    tables = capsys.readouterr().out
    assert all(f"| {engine} |" in tables for engine in IN_PROCESS)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
@pytest.mark.timeout(400)  # two starts of torchrun; half a minute each on a machine that is busy
def test_two_ranks_as_a_person_starts_them(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    options = ["--state", "A", "--engines", "shardckpt", "--measures", "save", "load", "--ranks", "2"]
    command = [sys.executable, "-m", "benchmarks", *TINY, *options, "--root", str(tmp_path), "--json", str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=380)
    assert ended.returncode == 0, ended.stderr
    samples = Results.decode(file.read_text()).samples
    assert [(sample.ranks, sample.measure) for sample in samples] == [(2, "save"), (2, "load")]
    assert all(sample.values["verified"] for sample in samples)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_was_cut_off_goes_on_and_redoes_what_was_noisy(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = [*TINY, "--state", "B", "--engines", "torch.save", "--measures", "save", "load", "--root",
                 str(tmp_path), "--json", str(file)]  # fmt: skip
    assert main(arguments) == 0
    whole = Results.decode(file.read_text())
    save, load = whole.samples
    noisy = replace(load, others=9.0, values={**load.values, "seconds": [99.0]})
    file.write_text(replace(whole, samples=[replace(save, others=0.0), noisy]).encode())
    assert main(arguments) == 0
    assert Results.decode(file.read_text()).samples[1] == noisy
    assert main([*arguments, "--redo-above", "5"]) == 0
    assert Results.decode(file.read_text()).samples[1].values["seconds"][0] < 99.0


def test_a_peer_that_is_not_installed_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "elsewhere", Entry(TorchSave, frozenset({"save"}), "no_such_package"))  # type: ignore[arg-type]
    assert main([*TINY, "--engines", "elsewhere", "--measures", "save", "--root", str(tmp_path)]) == 0
    assert "elsewhere was skipped: it needs the package no_such_package" in capsys.readouterr().out


def test_an_engine_that_loads_something_else_gives_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchSave, "_read", lambda self, path, into: None)
    task = Task("save", "torch.save", Shape("B", 0, count=3), str(tmp_path), 2)
    with pytest.raises(WrongContentError, match="3 tensors differ"):
        measure(task, None)


def test_results_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--engines", "torch.save", "--measures", "stall", "--root", str(tmp_path), "--json", str(file)]
    assert main([*TINY, *arguments]) == 0  # torch.save has no part in that measure
    file.write_text(Results.decode(_some_results()).encode())
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, *arguments])


def _some_results() -> str:
    settings = {"shapes": [], "ranks": [1], "engines": [], "rounds": 1, "saves": 2, "measures": []}
    return json.dumps({"format": 1, "settings": settings, "machine": {}, "command": "", "samples": []})


def test_the_state_is_never_zero_and_follows_from_its_numbers() -> None:
    shape = Shape("A", 2_000_000, layers=2)
    state, twin = (make(shape, rank=0, mesh=None) for _ in range(2))
    assert state.digests() == twin.digests()
    assert 1_900_000 < state.nbytes < 2_100_000
    assert not any(torch.count_nonzero(local) < local.numel() / 2 for _, local in state.locals())
    before = state.digests()
    state.compute()
    assert state.digests() == before
    state.update()
    changed = [name for name, digest in state.digests().items() if digest != before[name]]
    assert len(changed) == len(before)


def test_a_shrunk_state_has_the_same_tensors_by_name() -> None:
    for shape in (Shape("A", 2_000_000, layers=2), Shape("B", 0, count=5)):
        whole, shrunk = make(shape, rank=0, mesh=None), make(shape.shrunk(), rank=0, mesh=None)
        assert list(whole.tensors) == list(shrunk.tensors)
        assert shrunk.nbytes < whole.nbytes


def test_a_spread_counts_each_round_once() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([]) is None


def test_a_job_that_fails_is_told_and_the_exit_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> dict[str, object]:
        raise JobFailedError("exit status 1")

    monkeypatch.setattr("benchmarks.rounds.run_job", fail)
    status = main([*TINY, "--engines", "torch.save", "--measures", "save", "load", "--root", str(tmp_path)])
    assert status == 1
    assert "FAILED: round 1 | 1 rank | A | torch.save | save: exit status 1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
