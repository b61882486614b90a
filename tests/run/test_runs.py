"""Runs: numbers that nobody gets twice, run.json, and what a resumed run has otherwise."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.run.registry.config import Difference, differences, plain_config
from shardckpt.run.registry.origin import code_version
from shardckpt.run.registry.runfile import RunInfo, SavedStep, Session, decode_run, encode_run
from shardckpt.run.registry.runs import parse_run, run_folder
from shardckpt.testing.gangs import run_ranks
from shardckpt.testing.pool import ProcessPool
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

LOCAL = sc.Gangs.local


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "local" else f"memory://{tmp_path.name}"


def test_runs_are_numbered_and_found_again(root: str) -> None:
    with sc.Runs(root, LOCAL()) as runs:
        assert runs.list() == []
        with pytest.raises(sc.CheckpointNotFoundError, match=r"no run 'latest'"):
            runs.open()
        made = [runs.new(name=name, config={"lr": 0.1}) for name in ("a", "b", "a")]
        assert [run.folder for run in made] == ["run_001", "run_002", "run_003"]
        assert runs.new(number=7).number == 7
        with pytest.raises(sc.CheckpointSaveError, match=r"there is a run 7 .* open\(7\)"):
            runs.new(number=7)
        assert runs.new().number == 8
        found = [runs.open(which).number for which in (3, "a", "b", "run_002", "latest")]
        assert found == [3, 3, 2, 2, 8]
        for which in (5, "c", "run_005"):
            with pytest.raises(sc.CheckpointNotFoundError):
                runs.open(which)
        assert [(one.number, one.info.name if one.info else "") for one in runs.list()] == [
            (1, "a"), (2, "b"), (3, "a"), (7, ""), (8, ""),
        ]  # fmt: skip


def test_run_json_says_what_the_run_is(root: str) -> None:
    with sc.Runs(root, LOCAL()) as runs:
        info = runs.new(name="first", config={"lr": 0.1}).look()
    assert (info.number, info.name, info.config, info.world_size) == (1, "first", {"lr": 0.1}, 1)
    (session,) = info.sessions
    assert session.environment["torch"] == torch.__version__
    assert {"python", "shardckpt", "platform"} <= session.environment.keys()
    assert session.host
    assert info.created <= session.started or info.created[:16] == session.started[:16]


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        told = subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return told.stdout.strip()

    (tmp_path / "x.py").write_text("1")
    git("init", "-q")
    assert code_version(tmp_path) is None
    git("add", "x.py")
    git("commit", "-qm", "one")
    found = code_version(tmp_path)
    assert found is not None
    assert (found.commit, found.dirty) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "x.py").write_text("2")
    with sc.Runs(tmp_path / "runs", LOCAL()) as runs:
        code = runs.new(code=tmp_path).info.code
    assert code is not None
    assert (code.commit, code.dirty) == (found.commit, True)
    assert code_version(tmp_path / "nowhere") is None


def test_the_history_has_the_steps_that_were_saved_with_their_scores(root: str) -> None:
    with sc.Runs(root, LOCAL()) as runs:
        run = runs.new(name="a")
        with sc.CheckpointManager(run, LOCAL(), keep=sc.KeepLast(1)) as checkpoints:
            for step in (10, 20):
                checkpoints.save(step, {"w": torch.ones(2)})
                checkpoints.save_score(step / 100, step=step)
                checkpoints.wait()
            checkpoints.save_score(0.5, step=20)
        history = run.look().history
        assert [(saved.step, saved.metrics) for saved in history] == [(10, {"score": 0.1}), (20, {"score": 0.5})]
        assert all(saved.nbytes > 0 and saved.saved for saved in history)
        (summary,) = runs.list()
        assert (summary.folder, summary.steps) == ("run_001", (20,)), "10 is gone, and in the history"
        with sc.CheckpointManager(runs.open("a"), LOCAL()) as checkpoints:
            assert checkpoints.steps() == [20]


def test_a_run_json_that_is_lost_or_damaged_harms_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sc.Runs(tmp_path, LOCAL()) as runs:
        run = runs.new()
        (tmp_path / "run_001/run.json").write_text('{"format": 1, "num')
        with sc.CheckpointManager(run, LOCAL()) as checkpoints:
            checkpoints.save(1, {"w": torch.ones(2)}).result()
        assert "the history of the run lacks an entry" in caplog.text
        (summary,) = runs.list()
        assert (summary.info, summary.steps) == (None, (1,))
        assert "damaged" in summary.problem
        with pytest.raises(sc.CheckpointDamagedError):
            runs.open(1)
        assert runs.new().number == 2
        assert runs.open().number == 2


def test_a_resumed_run_says_what_differs(root: str, caplog: pytest.LogCaptureFixture) -> None:
    with sc.Runs(root, LOCAL()) as runs:
        runs.new(config={"optimizer": {"lr": 0.1, "name": "adam"}, "layers": [1, 2], "seed": 1})
        same = runs.open(1, config={"seed": 1, "layers": (1, 2), "optimizer": {"lr": 0.1, "name": "adam"}})
        assert same.differences == ()
        assert "differs" not in caplog.text
        other = runs.open(1, config={"optimizer": {"lr": 0.01, "name": "adam"}, "layers": [1, 2, 3], "amp": True})
        assert other.differences == (
            Difference("amp", "added", now=True),
            Difference("layers.2", "added", now=3),
            Difference("optimizer.lr", "changed", 0.1, 0.01),
            Difference("seed", "removed", was=1),
        )
        assert "differs in 4 entries" in caplog.text
        assert "optimizer.lr: 0.1 is now 0.01" in caplog.text
        seen = runs.open(1)
        assert seen.differences == ()
        assert [len(session.differences) for session in seen.info.sessions] == [0, 0, 4]
        assert seen.info.config["amp"] is True


def test_no_credential_comes_into_run_json(tmp_path: Path) -> None:
    config = {
        "data": "s3://user:hunter2@bucket/x?token=hunter2",
        "urls": ["https://a/b?sig=hunter2#hunter2"],
        "wandb": {"api_key": "hunter2", "HF_TOKEN": "hunter2", "db.password": "hunter2"},
        "text": "see https://me:hunter2@host/path for more",
        "eos_token": "</s>",
        "max_tokens": 5,
    }
    with sc.Runs(tmp_path, LOCAL()) as runs:
        runs.new(config=config)
        runs.open(1, config={**config, "data": "s3://u:hunter2b@other"})
    text = (tmp_path / "run_001/run.json").read_text()
    assert "hunter2" not in text
    found = json.loads(text)["config"]
    assert (found["data"], found["eos_token"], found["max_tokens"]) == ("s3://other", "</s>", 5)


@dataclasses.dataclass
class _Config:
    lr: float = 0.1
    dtype: torch.dtype = torch.float32
    where: Path = Path("/a")
    tags: frozenset[str] = frozenset({"b", "a"})


def test_configs_of_every_usual_kind() -> None:
    plain = {"lr": 0.1, "dtype": "torch.float32", "where": "/a", "tags": ["a", "b"]}
    assert plain_config(_Config()) == plain
    assert plain_config(argparse.Namespace(inner=_Config(), lr=float("inf"))) == {"inner": plain, "lr": "inf"}
    for bad in (5, "text", [1]):
        with pytest.raises(sc.InvalidStateError, match="a dict, a dataclass"):
            plain_config(bad)
    loop: dict[str, Any] = {}
    loop["x"] = loop
    with pytest.raises(sc.InvalidStateError, match="holds itself"):
        plain_config(loop)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab."),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("xy", min_size=1), _PLAIN), st.dictionaries(st.text("xy", min_size=1), _PLAIN))
def test_differences_are_none_exactly_between_equal_configs(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert differences(one, one) == ()
    equal = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    if "." not in json.dumps([one, other]):
        assert (differences(one, other) == ()) == equal
    info = RunInfo(1, "a", "n", "t", one, (Session("t", "h", 2, {"p": "1"}, None, differences(one, other)),))
    assert decode_run(encode_run(info)) == info


def test_steps_are_by_number_and_infinite_metrics_come_back() -> None:
    info = RunInfo(1, "a", "n", "t")
    for step in (5, 3, 5):
        info = info.with_step(SavedStep(step, "t", step, {"score": float("inf")}))
    assert [saved.step for saved in info.history] == [3, 5]
    assert decode_run(encode_run(info)) == info
    early = info.with_metrics(9, {"loss": 1.0}).with_step(SavedStep(9, "t", 9))
    assert early.history[-1] == SavedStep(9, "t", 9, {"loss": 1.0}), "measured before it was noted"
    assert info.with_step(SavedStep(5, "later", 1)).history[-1].metrics == {}, "saved again"
    assert dict(info.with_metrics(5, {"loss": 1.0}).history[1].metrics) == {"score": float("inf"), "loss": 1.0}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "number": "1"}', "[" * 5000])
def test_what_is_no_run_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_run(text.encode())


def test_names_of_folders() -> None:
    assert [run_folder(number) for number in (1, 42, 999, 1000)] == ["run_001", "run_042", "run_999", "run_1000"]
    assert [parse_run(name) for name in ("run_001/", "run_1000", "run_000", "run_1", "run_0042", "x")] == [
        1, 1000, None, None, None, None,
    ]  # fmt: skip


def _race(make: Callable[[], sc.Runs], *, threads: int, each: int) -> list[int]:
    """The numbers that these threads got, all starting at once."""
    got: list[int] = []
    start = threading.Barrier(threads)

    def work() -> None:
        with make() as runs:
            start.wait(30)
            for _ in range(each):
                got.append(runs.new(name=threading.current_thread().name).number)

    workers = [threading.Thread(target=work, name=f"racer-{number}") for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return sorted(got)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking git: eight times in a race it would take longer than the race."""
    monkeypatch.setattr("shardckpt.run.registry.runs.code_version", lambda folder: None)


@pytest.mark.usefixtures("quick")
def test_threads_that_race_for_numbers_get_each_once(tmp_path: Path) -> None:
    assert _race(lambda: sc.Runs(tmp_path, LOCAL()), threads=4, each=10) == list(range(1, 41))
    with sc.Runs(tmp_path, LOCAL()) as runs:
        assert [one.number for one in runs.list() if one.info and one.info.number == one.number] == list(range(1, 41))


@pytest.mark.s3
@pytest.mark.usefixtures("quick")
def test_threads_that_race_on_s3_get_each_once(s3: S3Server, place: Callable[[S3Server], str]) -> None:
    url = place(s3)
    got = _race(lambda: sc.Runs(url, LOCAL(), storage_options=dict(s3.options)), threads=2, each=4)
    assert got == list(range(1, 9))


def _make_runs(root: str, gate: Any, answers: Any) -> None:
    gate.wait(30)
    with sc.Runs(root, LOCAL()) as runs:
        answers.put([runs.new().number for _ in range(10)])


def test_processes_that_race_for_numbers_get_each_once(tmp_path: Path, quick: None) -> None:
    fork = multiprocessing.get_context("fork")
    gate, answers = fork.Barrier(2), fork.SimpleQueue()
    workers = [fork.Process(target=_make_runs, args=(str(tmp_path), gate, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    got = [number for _ in workers for number in answers.get()]
    for worker in workers:
        worker.join(30)
        worker.close()
    answers.close()
    assert sorted(got) == list(range(1, 21))


@pytest.mark.usefixtures("quick")
def test_all_ranks_of_a_job_get_one_run(tmp_path: Path) -> None:
    def job(gangs: sc.Gangs) -> tuple[str, int, str]:
        with sc.Runs(tmp_path, gangs, timeout=timedelta(seconds=20)) as runs:
            run = runs.new(config={"rank": gangs.root.rank})
            again = runs.open(1, config={"rank": 5})
            with pytest.raises(sc.CheckpointNotFoundError):
                runs.open(9)
            return run.folder, again.info.world_size, str(again.differences[0])

    assert run_ranks(3, job) == [("run_001", 3, "rank: 0 is now 5")] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["run_001"]


def make_run_and_save(rank: int, world_size: int, folder: Path, root: str) -> tuple[str, list[int]]:
    """In a process of a job with a gloo group."""
    with sc.Runs(root) as runs:
        run = runs.new(name="job", config={"rank": rank}, code="/")
        with sc.CheckpointManager(run) as checkpoints:
            checkpoints.save(3, {"w": torch.full((2,), float(rank))}).result()
        return run.folder, [saved.step for saved in run.look().history]


def test_the_processes_of_a_job_get_one_run(ranks: ProcessPool, tmp_path: Path) -> None:
    for number in (1, 2):
        folders = {folder for folder, _ in ranks.run(2, make_run_and_save, str(tmp_path))}
        assert folders == {f"run_00{number}"}
    with sc.Runs(tmp_path, LOCAL()) as runs:
        assert [(run.steps, run.info and run.info.world_size) for run in runs.list()] == [((3,), 2)] * 2


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    refused = pytest.raises(sc.CheckpointSaveError, match="cannot make a run")
    with sc.Runs(tmp_path / "runs", LOCAL()) as runs, refused:
        runs.new()
