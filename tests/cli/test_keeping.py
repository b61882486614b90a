"""`runs`, `prune`, `pin`, `unpin`: what they print, how they end, and that only --apply deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from tests.cli.test_listing import run


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run with five steps, of which 2 has the lowest score."""
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"
    with sc.CheckpointManager(url, sc.Gangs.local()) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, {"model": torch.ones(2)})
            checkpoints.save_score(abs(step - 2), step=step)
            checkpoints.save_metrics({"loss": step}, step=step)
    return url


def steps(url: str) -> list[int]:
    with sc.CheckpointManager(url, sc.Gangs.local()) as checkpoints:
        return checkpoints.steps()


def test_pruning_is_a_dry_run_first_and_says_why(url: str) -> None:
    assert run("pin", url, "--step", 3) == (0, "step 3 is pinned", "")
    command = ("prune", url, "--keep-last", 1, "--keep-best", 1, "--lower-better")
    policy = "KeepLast(n=1) | KeepBest(n=1, lower_better=True, metric='score')"
    status, told, said = run(*command)
    assert (status, said) == (1, "nothing was changed; --apply does it")
    assert told.splitlines() == [
        f"delete  step 1: not kept by {policy}",
        "keep    step 2: number 1 of the best: 0.0",
        "keep    step 3: pinned",
        f"delete  step 4: not kept by {policy}",
        "keep    step 5: the last committed step; one of the last 1",
    ]
    assert steps(url) == [1, 2, 3, 4, 5]
    status, told, said = run(*command, "--apply")
    assert (status, said) == (0, "")
    assert told.splitlines()[0] == f"deleted step 1: not kept by {policy}"
    assert told.splitlines()[-1].startswith("2 steps deleted, ")
    assert steps(url) == [2, 3, 5]
    assert run(*command)[0] == 0


def test_pins_come_and_go(url: str) -> None:
    assert run("pin", url, "--step", 9) == (1, "", f"there is no committed checkpoint of step 9 in {url}")
    assert run("unpin", url, "--step", 3) == (1, "step 3 was not pinned", "")
    run("pin", url, "--step", 3)
    assert run("unpin", url, "--step", 3) == (0, "step 3 is no longer pinned", "")
    run("prune", url, "--keep-every", 5, "--yes")
    assert steps(url) == [5]


def test_json_and_another_metric(url: str) -> None:
    command = ("prune", url, "--keep-best", 1, "--metric", "loss", "--lower-better", "--json")
    found = json.loads(run(*command)[1])
    assert [one["step"] for one in found["steps"] if one["kept"]] == [1, 5]
    assert (found["applied"], found["deleted"]) == (False, [])
    found = json.loads(run(*command, "--apply")[1])
    assert [one["step"] for one in found["deleted"]] == [2, 3, 4]
    assert steps(url) == [1, 5]


def test_without_a_rule_nothing_is_pruned(url: str) -> None:
    status, told, said = run("prune", url, "--apply")
    assert (status, told) == (2, "")
    assert "--keep-last N" in said
    assert steps(url) == [1, 2, 3, 4, 5]


def test_where_there_is_nothing_to_prune_it_says_so(tmp_path: Path) -> None:
    command = ("--keep-last", 1)
    assert run("prune", tmp_path, *command) == (0, "", f"there are no committed steps in {tmp_path}")
    assert run("prune", tmp_path / "none", *command) == (1, "", f"there is nothing at {tmp_path}/none")


def test_a_table_of_runs(tmp_path: Path) -> None:
    assert run("runs", tmp_path)[::2] == (
        1, "there are no runs here; `shardckpt ls` lists folders of steps that have other names",
    )  # fmt: skip
    with sc.Runs(tmp_path, sc.Gangs.local()) as runs:
        with sc.CheckpointManager(runs.new(name="first", code="/"), sc.Gangs.local()) as checkpoints:
            checkpoints.save(7, {"model": torch.ones(2)})
        runs.new(name="second", code="/")
    (tmp_path / "run_003").mkdir()
    (tmp_path / "run_003/run.json").write_text("{")
    status, told, said = run("runs", tmp_path)
    assert (status, said) == (0, "")
    head, *lines = told.splitlines()
    assert head.split() == ["run", "name", "age", "steps", "latest", "saved", "ranks", "host", "code"]
    first, second, third = (line.split() for line in lines)
    assert (first[:2], first[-6:-2], first[-1]) == (["run_001", "first"], ["1", "7", "1", "1"], "-")
    assert (second[:2], second[-1]) == (["run_002", "second"], "-")
    assert third[:5] == ["run_003", "(its", "run.json", "is", "damaged)"]
    found = json.loads(run("runs", tmp_path, "--json")[1])["runs"]
    assert [(one["folder"], one["steps"], one["info"] and one["info"]["name"]) for one in found] == [
        ("run_001", [7], "first"), ("run_002", [], "second"), ("run_003", [], None),
    ]  # fmt: skip


def test_the_best_of_each_run_and_the_metrics_of_each_step(tmp_path: Path) -> None:
    with sc.Runs(tmp_path, sc.Gangs.local()) as runs:
        for name, losses in (("first", (0.5, 0.25, 0.75)), ("second", (0.125,)), ("third", ())):
            run_ = runs.new(name=name, code="/")
            with sc.CheckpointManager(run_, sc.Gangs.local()) as checkpoints:
                for step, loss in enumerate(losses, start=1):
                    checkpoints.save(step, {"model": torch.ones(2)})
                    checkpoints.save_metrics({"loss": loss}, step=step)
                checkpoints.save_metrics({"accuracy": 0.9}, step=1) if losses else None
    status, told, _ = run("runs", tmp_path, "--best", "loss", "--lower-better")
    head, *lines = told.splitlines()
    assert (status, head.split()[4:7]) == (0, ["latest", "best", "loss"])
    found = [line.split() for line in lines]
    assert [(line[1], *line[-7:-4]) for line in found] == [
        ("first", "3", "2", "0.25"), ("second", "1", "1", "0.125"), ("third", "-", "-", "-"),
    ]  # fmt: skip
    told = run("runs", tmp_path, "--best", "accuracy")[1]
    assert [line.split()[-6:-4] for line in told.splitlines()[1:]] == [["1", "0.9"], ["1", "0.9"], ["-", "-"]]
    head, *lines = run("ls", tmp_path / "run_001", "--metrics")[1].splitlines()
    assert head.split() == ["step", "age", "size", "ranks", "score", "accuracy", "loss", "state", "parts"]
    assert [line.split()[-5:-2] for line in lines] == [["-", "0.9", "0.5"], ["-", "-", "0.25"], ["-", "-", "0.75"]]
    found = json.loads(run("ls", tmp_path / "run_001", "--metrics", "--json")[1])["steps"]
    assert [step["metrics"] for step in found] == [{"accuracy": 0.9, "loss": 0.5}, {"loss": 0.25}, {"loss": 0.75}]


def test_a_link_to_a_step_that_is_deleted_goes_with_it(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as checkpoints:
        checkpoints.keep_links()
        for step in (1, 2):
            checkpoints.save(step, {"model": torch.ones(2)})
            checkpoints.save_score(-step, step=step)
    assert (tmp_path / "best").resolve().name == "step_1"
    assert run("prune", tmp_path, "--keep-last", 1, "--lower-better", "--apply")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_2"]
