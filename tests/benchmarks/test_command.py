"""The whole command on a tiny state: what it writes, and that every number in it stands on a verified load."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.__main__ import _parser, _settings, main
from benchmarks.engines import ENGINES, Entry
from benchmarks.engines.rankfiles import TorchSave
from benchmarks.gauges import unsynced
from benchmarks.job import Task, WrongContentError, measure
from benchmarks.job import main as job_main
from benchmarks.limits import LIMITS, REMOTE_LIMITS
from benchmarks.rounds import JobFailedError, Results
from benchmarks.states import Shape
from shardckpt.testing.pool import ProcessPool
from tests.storage.s3server import ACCESS_KEY, SECRET_KEY, running

TINY = ["--gb", "0", "--layers", "1", "--count", "20", "--tokens", "8", "--rounds", "1", "--saves", "2",
        "--steps", "10"]  # fmt: skip

ASYNC = ("torch_checkpointing, async",)
"""Besides those with "process" in their name: they start a process that imports this one's main module."""
IN_PROCESS = [
    name for name, entry in ENGINES.items() if not entry.missing and "process" not in name and name not in ASYNC
]


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
    gc.freeze()  # each measure collects garbage first: not through all that earlier tests have imported


def job_on_rank(rank: int, world_size: int, folder: Path, file: Path, port: int) -> None:
    """In a process of the pool, with the environment that torchrun gives."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", **{key: str(place[key]) for key in place}}):
        job_main(file)


@pytest.fixture
def in_the_pool(monkeypatch: pytest.MonkeyPatch, ranks: ProcessPool, free_port: int) -> None:
    """The ranks of a job are processes of the pool."""

    def run_job(task: Task, size: int, folder: Path) -> dict[str, Any]:
        file = folder / "task.json"
        file.write_text(task.encode())
        ranks.run(size, job_on_rank, file, free_port, backend=None)
        values: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return values

    monkeypatch.setattr("benchmarks.rounds.run_job", run_job)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.leaks(threads=("asyncio_",), files=("socket:", "anon_inode:", "pipe:"), why="torchsnapshot")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("state", ["A", "B", "C", "D"])
def test_every_measure_of_every_engine_is_verified(
    tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    arguments = ["--state", state, "--engines", *IN_PROCESS, "--root", str(tmp_path), "--json", str(file)]
    assert main([*TINY, *arguments]) == 0
    results = Results.decode(file.read_text())
    taken = {(sample.engine, sample.measure): sample.values for sample in results.samples}
    expected = {(engine, each) for engine in IN_PROCESS for each in ENGINES[engine].measures if each != "reshard"}
    assert set(taken) == expected | {("limits", "limits")}
    assert not results.failed
    assert all(taken[key]["verified"] for key in expected)
    assert set(taken["limits", "limits"]) == set(LIMITS)
    assert all(rate > 0 for rate in taken["limits", "limits"].values())
    for engine, each in expected:
        values = taken[engine, each]
        if each == "loop":
            assert all(len(values[f"{kind}_s"]) == 2 for kind in ("plain", "bare", "saved")), "forth and back"
            assert len(values["stall_s"]) == len(values["bare_stall_s"]) == 2, "a save in each"
            assert values["file_nbytes"] > values["state_nbytes"]
            assert values["bare_file_nbytes"] >= values["state_nbytes"]
        elif each == "stall":
            assert values["stall_s"][0] >= values["blocked_s"][0] > 0
        else:
            assert all(seconds > 0 for seconds in values["seconds"])
        if each in ("save", "cached"):
            assert values["file_nbytes"] > values["state_nbytes"] > 0
    tables = capsys.readouterr().out
    assert all(f"| {engine} |" in tables for engine in IN_PROCESS)
    assert "Against the goals" in tables
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


TWO_RANKS = ["--state", "A", "--engines", "shardckpt", "--ranks", "2", "--reshard", "1", "--measures"]


def samples_of_two(file: Path) -> dict[str, dict[str, Any]]:
    """By measure."""
    samples = Results.decode(file.read_text()).samples
    assert all(sample.ranks == 2 and sample.values["verified"] for sample in samples)
    return {sample.measure: sample.values for sample in samples}


@pytest.mark.slow
@pytest.mark.timeout(400)  # a start of torchrun; half a minute on a machine that is busy
def test_two_ranks_that_torchrun_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert main([*TINY, *TWO_RANKS, "save", "--root", str(tmp_path), "--json", str(file)]) == 0
    assert "round 1 | 2 ranks | A, 0 GB | shardckpt | save" in capsys.readouterr().err
    samples = samples_of_two(file)
    assert list(samples) == ["save"]
    assert len(samples["save"]["phases"]) == 2


@pytest.mark.usefixtures("in_the_pool")
def test_two_ranks_save_and_one_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    measures = ["save", "reshard", "stall"]
    assert main([*TINY, *TWO_RANKS, *measures, "--root", str(tmp_path), "--json", str(file)]) == 0
    assert "round 1 | 2 ranks | A, 0 GB | shardckpt | reshard to 1" in capsys.readouterr().err
    samples = samples_of_two(file)
    assert set(samples) == {"save", "reshard to 1", "stall"}
    assert len(samples["save"]["phases"]) == len(samples["stall"]["phases"]) == 2
    assert 0 <= samples["save"]["state_nbytes"] - samples["reshard to 1"]["state_nbytes"] < 100, "scalars on each rank"


@pytest.mark.usefixtures("in_the_pool")
def test_a_peer_saves_while_two_ranks_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, engines = tmp_path / "results.json", ("shardckpt", "dcp.async_save, thread")
    options = ["--engines", *engines, "--measures", "loop", "--ranks", "2"]
    assert main([*TINY, *options, "--root", str(tmp_path), "--json", str(file)]) == 0
    values = {sample.engine: sample.values for sample in Results.decode(file.read_text()).samples}
    assert set(values) == set(engines)
    for told in values.values():
        assert told["verified"]
        assert told["bare_file_nbytes"] >= told["state_nbytes"], "of both ranks"
    assert "| dcp.async_save, thread | files, not folders |" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_several_sizes_in_one_run(tmp_path: Path) -> None:
    file, sizes = tmp_path / "results.json", ["--gb", "0.001", "0.002"]
    options = ["--state", "B", "C", "--engines", "torch.save", "--measures", "save", "--root", str(tmp_path)]
    assert main([*TINY, *sizes, *options, "--json", str(file)]) == 0
    samples = Results.decode(file.read_text()).samples
    assert [sample.state for sample in samples] == ["B", "C, 0.001 GB", "C, 0.002 GB"]
    assert samples[2].values["state_nbytes"] > samples[1].values["state_nbytes"] * 1.9


def test_a_loop_is_a_whole_number_of_saves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--steps", "15"])
    assert "15 is not a multiple of 10" in capsys.readouterr().err


@pytest.mark.s3
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.larger
def test_any_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    engines = [name for name in IN_PROCESS if ENGINES[name].anywhere and name.startswith(("shard", "torch", "safe"))]
    with running() as server:
        server.make_bucket()
        for name, value in (("KEY_ID", ACCESS_KEY), ("ACCESS_KEY", SECRET_KEY)):
            monkeypatch.setenv(f"AWS_{'ACCESS_' if name == 'KEY_ID' else 'SECRET_'}{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        file, root = tmp_path / "results.json", f"s3://{server.bucket}/runs"
        arguments = ["--state", "D", "--engines", *engines, "torchsnapshot", "--root", root, "--json", str(file),
                     "--measures", "limits", "save", "load", "cold"]  # fmt: skip
        assert main([*TINY, *arguments]) == 0
        assert not server.file_system.find(server.bucket), "something was left behind"
    results = Results.decode(file.read_text())
    assert results.skipped["torchsnapshot"] in ("saves to folders only", "needs the package torchsnapshot, which is "
                                                "not installed")  # fmt: skip
    taken = {(sample.engine, sample.measure): sample.values for sample in results.samples}
    assert set(taken["limits", "limits"]) == set(REMOTE_LIMITS)
    for engine in engines:
        assert taken[engine, "save"]["file_nbytes"] > taken[engine, "save"]["state_nbytes"]
        assert taken[engine, "load"]["verified"]
        assert (engine, "cold") not in taken, "there is no page cache to forget"
    assert SECRET_KEY not in file.read_text()


def test_memory_is_not_shared_by_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--root", "memory://runs"])
    assert "memory:// is not shared" in capsys.readouterr().err


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
    monkeypatch.setitem(ENGINES, "elsewhere", Entry(TorchSave, frozenset({"save"}), "no_such_package"))  # type: ignore[index]
    assert main([*TINY, "--engines", "elsewhere", "--measures", "save", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "elsewhere is skipped: it needs the package no_such_package" in shown.err
    assert "elsewhere was skipped: it needs the package no_such_package" in shown.out


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
    return json.dumps({"format": 3, "settings": settings, "machine": {}, "command": "", "samples": []})


def test_a_job_that_fails_is_told_and_the_exit_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs the save is left out; the other measures of the engine are not."""
    tried = []

    def fail(task: Task, *_: object) -> dict[str, object]:
        tried.append(task.measure)
        raise JobFailedError("exit status 1")

    monkeypatch.setattr("benchmarks.rounds.run_job", fail)
    options = ["--engines", "torch.save", "--measures", "save", "load", "cached", "--root", str(tmp_path)]
    assert main([*TINY, *options]) == 1
    assert "FAILED: round 1 | 1 rank | A, 0 GB | torch.save | save: exit status 1" in capsys.readouterr().out
    assert tried == ["save", "cached"]
    assert not list(tmp_path.iterdir())


def test_unsynced_is_over_afterwards(tmp_path: Path) -> None:
    before = os.fsync
    with unsynced(), open(tmp_path / "file", "wb") as file:
        os.fsync(-1)
        os.fdatasync(file.fileno())
        os.sync()
    assert os.fsync is before
    with pytest.raises(ValueError, match="negative"):
        os.fsync(-1)


def test_the_engines_are_told_whether_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sync that counts: every engine makes its files durable, and none does without being asked."""
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(1) or real(file))
    for engine in ("shardckpt", "torch.save", "safetensors", "dcp.save", "torch_checkpointing", "torchsnapshot"):
        if ENGINES[engine].missing:
            continue
        for kind in ("save", "cached"):
            synced.clear()
            measure(Task(kind, engine, Shape("B", 0, count=3), str(tmp_path / engine / kind), 2), None)
            assert bool(synced) == (kind == "save"), (engine, kind)


def test_files_that_are_measured_hold_no_zeros(tmp_path: Path) -> None:
    measure(Task("save", "torch.save", Shape("C", 1 << 20), str(tmp_path), 2), None)
    loaded = torch.load(tmp_path / "step_1" / "rank_0", weights_only=True)["one.large"]
    assert loaded.numel() == 1 << 18
    assert torch.count_nonzero(loaded) == loaded.numel()


def test_what_loads_needs_a_save_first() -> None:
    asked = _parser().parse_args([*TINY, "--measures", "cold"])
    assert _settings(asked).measures == ("save", "cold")
    assert _settings(_parser().parse_args([*TINY, "--measures", "stall"])).measures == ("stall",)
