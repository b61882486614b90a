"""The page "Coming from other systems": every row names tests that are there, and calls that exist; and the tests of
those rows that no other test shows, in the words of the five systems."""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardckpt as sc
from shardckpt.cli.commands import app
from shardckpt.manager.steps.scheduling import Schedule

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "shardckpt" / "COMING_FROM.md"
SYSTEMS = ("fairseq2", "Forgather", "BDH's training script", "DiffiT's LoRA runs", "A modular trainer")
RECEIVERS: dict[str, Any] = {
    "checkpoints": sc.CheckpointManager,
    "runs": sc.Runs,
    "run": sc.Run,
    "progress": sc.TrainingProgress,
    "schedule": Schedule,
    "sc": sc,
}
"""What a name in the code of the page stands for."""


class Row(NamedTuple):
    system: str
    there: str
    here: str
    tests: tuple[tuple[str, str], ...]


def read(page: str) -> list[Row]:
    """The rows of all its tables."""
    rows = []
    for section in page.split("\n## ")[1:]:
        system = section.splitlines()[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
        for line in lines:
            there, here, shown = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            tests = tuple((path, name) for path, name in re.findall(r"`([\w/]+\.py)::(?:\w+::)?(\w+)`", shown))
            rows.append(Row(system, there, here.replace("\\|", "|"), tests))
    return rows


@lru_cache
def functions_of(path: str) -> frozenset[str]:
    """The test functions of a file, parametrised or not, without importing it; none if there is no such file."""
    file = ROOT / path
    tree = ast.parse(file.read_text() if file.is_file() else "")
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def unknown_calls(text: str) -> Iterator[str]:
    """Of the code in this text: names, arguments and commands that there are not."""
    callbacks = {command.callback.__name__ for command in app.registered_commands if command.callback}
    commands = {name.replace("_", "-") for name in callbacks}
    for code in re.findall(r"`([^`]+)`", text):
        if code.startswith("shardckpt "):
            if code.split()[1] not in commands:
                yield code
            continue
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in RECEIVERS:
                owner = RECEIVERS[node.value.id]
                found = getattr(owner, node.attr, None)
                parameters = inspect.signature(found).parameters if callable(found) else {}
                given = calls[id(node)].keywords if id(node) in calls else []
                known = found is not None or (
                    inspect.isclass(owner) and f"self.{node.attr} = " in inspect.getsource(owner)
                )
                if not known or any(keyword.arg not in parameters for keyword in given):
                    yield f"{code}: {node.value.id}.{node.attr}"


def test_every_row_of_the_page_names_tests_and_calls_that_there_are() -> None:
    rows = read(PAGE.read_text())
    assert tuple(dict.fromkeys(row.system for row in rows)) == SYSTEMS
    assert min(sum(row.system == system for row in rows) for system in SYSTEMS) >= 8
    for row in rows:
        assert row.tests, f"{row.there}: no test"
        for path, name in row.tests:
            assert name in functions_of(path), f"{row.there}: there is no {path}::{name}"
        assert not list(unknown_calls(row.here)), row.there
    mine = {name for path, name in (test for row in rows for test in row.tests) if path.endswith("test_coming_from.py")}
    assert mine == {name for name in functions_of("tests/manager/test_coming_from.py") if name.startswith("test_")} - {
        "test_every_row_of_the_page_names_tests_and_calls_that_there_are",
        "test_what_is_not_there_is_found",
    }


@pytest.mark.parametrize(
    "code",
    [
        "sc.Nothing()",
        "checkpoints.keep_all()",
        "checkpoints.save(1, state, sure=True)",
        "run.nothing",
        "runs.new(nme='a')",
        "shardckpt x",
    ],
)
def test_what_is_not_there_is_found(code: str) -> None:
    assert list(unknown_calls(f"`{code}`"))
    assert not functions_of("tests/manager/test_nowhere.py")
    table = f"| a | b | c |\n| --- | --- | --- |\n| x | `{code}` \\| y | `tests/a.py::test_b` |\n"
    (row,) = read(f"# Page\n\n## A\n\n{table}")
    assert row == ("A", "x", f"`{code}` | y", (("tests/a.py", "test_b"),))


def manager(root: Any, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, sc.Gangs.local(), timeout=timedelta(seconds=20), **options)


class Adapted(nn.Module):
    """A layer with an adapter, as PEFT names it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def training(*, steps: int = 0) -> dict[str, Any]:
    model = Adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state |= {"scaler": torch.amp.GradScaler("cpu"), "progress": sc.TrainingProgress(), "rng": sc.RngState()}
    for _ in range(steps):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        state["progress"].advance(loss=1.5)
    return state


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state["model"].state_dict().items()}


def moment(optimizer: Any) -> torch.Tensor:
    return next(iter(optimizer.state_dict()["state"].values()))["exp_avg"]


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in one.items() if torch.equal(value, other[name])}


# Forgather


def test_modification_times_decide_nothing(tmp_path: Path) -> None:
    with manager(tmp_path) as checkpoints:
        for step in (100, 200):
            checkpoints.save(step, {"global_step": step})
    for path in (tmp_path / "step_100", *(tmp_path / "step_100").iterdir()):
        os.utime(path, (4e9, 4e9))
    os.utime(tmp_path / "step_200", (1, 1))
    state = {"global_step": 0}
    with manager(tmp_path, keep=sc.KeepLast(1)) as checkpoints:
        info = checkpoints.resume(state, True)
        assert info is not None
        assert (info.step, state["global_step"], checkpoints.latest()) == (200, 200, 200)
        checkpoints.keep_last_n_checkpoints(1)
        assert checkpoints.steps() == [200]


@pytest.mark.parametrize("saved", [True, False], ids=["saved and not restored", "not saved"])
def test_the_states_of_optimizer_and_scheduler_may_be_left_out(tmp_path: Path, saved: bool) -> None:
    one, other = training(steps=3), training()
    without = sc.Parts(optimizer=False, scheduler=False)
    with manager(tmp_path) as checkpoints:
        checkpoints.save(3, one if saved else without.of(one)).result()
        assert checkpoints.resume(without.of(other)) is not None
    assert alike(weights(one), weights(other)) == weights(one).keys()
    assert other["progress"].step == 3
    assert not other["optimizer"].state
    assert other["scheduler"].last_epoch == 0


def test_the_place_of_a_checkpoint_leads_back_to_it(tmp_path: Path) -> None:
    one, other = training(steps=1), training()
    with manager(tmp_path) as checkpoints:
        place = checkpoints.save(1, one).result().url
        checkpoints.save(2, training()).result()
        assert sc.verify(tmp_path, step=1).ok
        info = checkpoints.resume(other, place)
    assert info is not None
    assert info.step == 1
    assert alike(weights(one), weights(other)) == weights(one).keys()


def test_a_folder_of_theirs_comes_as_a_step(tmp_path: Path) -> None:
    """The model, and the rest of the state from `training_state.pt`, whose optimizer knows parameters by number."""
    one, old = training(steps=2), tmp_path / "checkpoint-2"
    old.mkdir()
    save_file(one["model"].state_dict(), old / "model.safetensors")
    state = {"optimizer": one["optimizer"].state_dict(), "lr_scheduler": one["scheduler"].state_dict()}
    torch.save({**state, "global_step": 2}, old / "training_state.pt")
    report = sc.convert(old, tmp_path / "run")
    assert (report.step, report.parts) == (2, ("model", "optimizer", "lr_scheduler", "global_step"))
    other = training()
    policy = sc.LoadPolicy(optimizers="by_number", rename={"scheduler": "lr_scheduler"})
    with manager(tmp_path / "run") as checkpoints:
        mine = {key: other[key] for key in ("model", "optimizer", "scheduler")}
        assert checkpoints.resume(mine, policy=policy) is not None
    assert alike(weights(one), weights(other)) == weights(one).keys()
    assert torch.equal(moment(other["optimizer"]), moment(one["optimizer"]))
    assert other["scheduler"].last_epoch == 2


# BDH


def test_what_a_checkpoint_of_theirs_holds_is_one_state_here(tmp_path: Path) -> None:
    one, other = training(steps=3), training()
    one["scaler"].scale(torch.ones(1))
    one["scaler"].update(64.0)
    assert one["progress"].improves(2.5, lower_better=True)
    with manager(tmp_path / "not" / "yet" / "there") as checkpoints:
        assert checkpoints.resume(other) is None
        checkpoints.save(3, one, metadata={"config": {"lr": 0.1}})
        drawn = torch.rand(1)
    with manager(tmp_path / "not" / "yet" / "there") as checkpoints:
        info = checkpoints.resume(other)
    assert info is not None
    assert (info.step, info.metadata) == (3, {"config": {"lr": 0.1}})
    assert torch.equal(torch.rand(1), drawn)
    assert alike(weights(one), weights(other)) == weights(one).keys()
    assert torch.equal(moment(other["optimizer"]), moment(one["optimizer"]))
    assert other["scaler"].state_dict() == one["scaler"].state_dict()
    progress = other["progress"]
    assert (progress.step, progress.best, progress.losses) == (3, 2.5, ((1, 1.5), (2, 1.5), (3, 1.5)))


def test_a_file_of_theirs_comes_as_a_step(tmp_path: Path) -> None:
    """A model is loaded by name, an optimizer that has no names by number; what else there is comes as values."""
    one, other = training(steps=2), training()
    old = {
        "model_state_dict": one["model"].state_dict(),
        "optimizer_state_dict": one["optimizer"].state_dict(),
        "step": 2,
        "config": {"lr": 0.1},
        "best_val_loss": 2.5,
        "rng_state": torch.get_rng_state(),
        "cuda_rng_state": None,
    }
    torch.save(old, tmp_path / "checkpoint-0000002.pt")
    assert sc.convert(tmp_path / "checkpoint-0000002.pt", tmp_path / "run").step == 2
    with manager(tmp_path / "run") as checkpoints:
        mine = {key: other[key] for key in ("model", "optimizer")}
        assert checkpoints.resume(mine, policy=sc.LoadPolicy(optimizers="by_number")) is not None
        _, state = checkpoints.load_last_checkpoint()
    assert alike(weights(one), weights(other)) == weights(one).keys()
    assert torch.equal(moment(other["optimizer"]), moment(one["optimizer"]))
    assert torch.equal(state["rng_state"], old["rng_state"])
    assert {key: state[key] for key in ("step", "config", "best_val_loss", "cuda_rng_state")} == {
        key: old[key] for key in ("step", "config", "best_val_loss", "cuda_rng_state")
    }


# DiffiT


def test_base_and_adapter_by_their_names(tmp_path: Path) -> None:
    one = training(steps=1)
    with manager(tmp_path) as checkpoints:
        checkpoints.save(1, one, frozen=("*",))
        adapter, base = training(), training()
        checkpoints.load(1, adapter, policy=sc.LoadPolicy(include=["model.*lora_*"]))
        checkpoints.load(1, base, policy=sc.LoadPolicy(include=["model"], exclude=["*lora_*"]))
    assert alike(weights(one), weights(adapter)) == {"lora_A", "lora_B"}
    assert alike(weights(one), weights(base)) == {"base.weight", "base.bias"}
    assert not adapter["optimizer"].state


def test_a_monitored_metric_says_what_is_kept_and_resumed(tmp_path: Path) -> None:
    with sc.Runs(tmp_path, sc.Gangs.local()) as runs:
        run = runs.new(name="diffit_lora_trees", config={"rank": 2}, code="/")
    keep = sc.KeepLast(2) | sc.KeepBest(1, metric="val_loss", lower_better=True)
    with manager(run, keep=keep) as checkpoints:
        schedule = checkpoints.schedule(sc.SaveEvery(epochs=1))
        for epoch, loss in enumerate((0.3, 0.1, 0.4, 0.2, 0.5), start=1):
            assert schedule.due(10 * epoch, epoch=epoch)
            checkpoints.save(10 * epoch, {"epoch": epoch})
            checkpoints.save_metrics({"val_loss": loss, "train_loss": loss / 2}, step=10 * epoch)
    state = {"epoch": 0}
    with manager(run, keep=keep) as checkpoints:
        assert checkpoints.steps() == [20, 40, 50]
        info = checkpoints.resume(state, "best")
    assert info is not None
    assert (info.step, state["epoch"]) == (20, 2)
    best = run.best("val_loss", lower_better=True)
    assert best is not None
    assert (best.step, best.metrics) == (20, {"val_loss": 0.1, "train_loss": 0.05})
    told = run.look()
    assert (run.number, told.name, told.config) == (1, "diffit_lora_trees", {"rank": 2})
    assert [saved.step for saved in told.history] == [10, 20, 30, 40, 50]


# A modular trainer


def test_an_old_checkpoint_without_random_states_is_told_and_completed(tmp_path: Path) -> None:
    one, other = training(steps=2), training()
    with manager(tmp_path) as checkpoints:
        checkpoints.save(2, sc.Parts(rng=False, scheduler=False).of(one)).result()
        (found,) = sc.verify(tmp_path).steps
        assert (found.verdict, found.parts["rng"], found.parts["scheduler"]) == ("PARTIAL", False, False)
        with pytest.raises(sc.CheckpointMismatchError, match=r"rng[^$]*scheduler|scheduler[^$]*rng"):
            checkpoints.resume(other)
        info = checkpoints.resume(other, policy=sc.LoadPolicy(missing="keep"))
        assert info is not None
        assert {name.partition(".")[0] for name in info.left} == {"rng", "scheduler"}
        random.seed(5)
        checkpoints.save(2, other).result()
        (found,) = sc.verify(tmp_path).steps
        assert (found.verdict, found.parts["rng"], found.parts["scheduler"]) == ("COMPLETE", True, True)
        drawn = random.random()
        assert checkpoints.resume(training(), 2) is not None
        assert random.random() == drawn


def test_a_checkpoint_that_matters_outlives_the_others(tmp_path: Path) -> None:
    with manager(tmp_path, keep=sc.KeepLast(1)) as checkpoints:
        for step in (1000, 2000, 3000):
            checkpoints.save(step, {"global_step": step}).result()
            if step == 1000:
                checkpoints.pin(1000)
    with manager(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1000, 3000]
