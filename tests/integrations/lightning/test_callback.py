"""`ModelCheckpoint`'s words mean what they mean there; other layouts, other places, and the `CheckpointIO`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from tests.integrations.forks import Forks
from tests.integrations.lightning.plans import EPOCH, Plan, Result, train
from tests.integrations.lightning.test_resuming import PRELOAD, run
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

pytestmark = pytest.mark.xdist_group("lightning")

WORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({"every_n_train_steps": 4}, {}),
    "steps, gathered": ({"every_n_train_steps": 3}, {"accumulate_grad_batches": 2}),
    "epochs": ({"every_n_epochs": 2}, {}),
    "each epoch, if nothing is said": ({}, {}),
    "after validation": ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"val_check_interval": 0.5}),
    "any time": ({"train_time_interval": timedelta(0)}, {}),
}
"""What is said to `ModelCheckpoint`, and to the trainer."""


def steps_of(root: str | Path) -> list[int]:
    with sc.CheckpointManager(root, sc.Gangs.local()) as checkpoints:
        return checkpoints.steps()


def use_all_words(rank: int, world_size: int, folder: Path, root: Path) -> dict[str, tuple[list[int], list[int]]]:
    """By Lightning's own callback and by ours: the steps that were saved."""
    found = {}
    for number, (name, (saved, trainer)) in enumerate(WORDS.items()):
        saved = {"monitor": None, "save_top_k": -1, **saved}
        plan = Plan(str(root / f"ours{number}"), epochs=2, saved=saved, trainer=trainer, plain_loader=True)
        train(rank, world_size, folder, plan)
        theirs = plan.but(root=str(root / f"theirs{number}"), theirs=True)
        train(rank, world_size, folder, theirs)
        steps = [int(path.stem.partition("step=")[2]) for path in Path(theirs.root).glob("*.ckpt")]
        found[name] = sorted(steps), steps_of(plan.root)
    return found


def use_one_after_the_other(rank: int, world_size: int, folder: Path, plans: list[Plan]) -> list[Result | str]:
    """What came of each; of one that fails the message."""
    results: list[Result | str] = []
    for plan in plans:
        try:
            results.append(train(rank, world_size, folder, plan))
        except sc.CheckpointError as error:
            results.append(str(error))
    return results


def by_value(result: Result) -> tuple[list[str], dict[str, float]]:
    """The best k, the smallest first."""
    values = {place: float(value) for place, value in result.seen["k"].items()}
    return sorted(values, key=values.__getitem__), values


def test_the_same_steps_are_saved(forks: Forks, tmp_path: Path) -> None:
    (found,) = forks.run(1, use_all_words, tmp_path, preload=PRELOAD)
    assert {name: ours for name, (_, ours) in found.items()} == {name: theirs for name, (theirs, _) in found.items()}
    assert all(theirs for theirs, _ in found.values())


def test_what_is_kept_what_is_best_and_where_a_run_begins(forks: Forks, tmp_path: Path) -> None:
    used = Plan(str(tmp_path / "used"), then_test="best", plain_loader=True, saved={"every_n_epochs": 1})
    weights = Plan(str(tmp_path / "weights"), then_test="last", saved={"save_weights_only": True}, plain_loader=True)
    theirs = used.but(root=str(tmp_path / "theirs"), theirs=True, saved={"every_n_epochs": 1, "save_last": True})
    plans = [
        used,
        used.but(saved={"every_n_epochs": 1, "mode": "max"}, root=str(tmp_path / "max")),
        used,  # again
        used.but(terms={"overwrite": "go on"}, epochs=1, then_test=""),
        weights,
        theirs,
        used.but(root=str(tmp_path / "new"), ckpt_path=f"{tmp_path}/theirs/last.ckpt", epochs=4, then_test=""),
        used.but(root=str(tmp_path / "other"), ckpt_path=f"{tmp_path}/max", epochs=4, then_test=""),
    ]
    (results,) = forks.run(1, use_one_after_the_other, plans, preload=PRELOAD)
    first, largest, again, gone_on, of_weights, own, from_theirs, from_ours = results
    epoch = 2 * EPOCH
    (smallest, values), large = by_value(first), by_value(largest)[0]
    assert (first.best, first.last) == (smallest[0], f"{used.root}/step_{3 * epoch}")
    assert steps_of(used.root)[-1:] == [3 * epoch], "the last one stays, whatever it is"
    assert first.seen["tested"] == own.seen["tested"] == {"test": pytest.approx(values[smallest[0]])}
    assert (largest.best, len(large)) == (large[-1], 2)
    assert largest.seen["tested"]["test"] > first.seen["tested"]["test"]
    assert "a fresh start was asked for" in again
    assert len(gone_on.losses) == epoch
    assert of_weights.seen["tested"]["test"] in map(pytest.approx, by_value(of_weights)[1].values()), (
        "of the model alone"
    )
    assert list(from_theirs.losses) == list(from_ours.losses) == list(range(3 * epoch, 4 * epoch))
    assert from_theirs.seen["mine"]
    assert from_ours.seen["mine"]


def test_another_layout_takes_it_up(forks: Forks, tmp_path: Path) -> None:
    """The state of each layout, in full, is that which was saved on another."""
    saved: dict[str, Any] = {"saved": {"every_n_epochs": 1}, "epochs": 1}
    before = run(forks, Plan(str(tmp_path), "fsdp2", **saved))[0]
    for layout in ("one", "tp", "ddp"):
        for after in run(forks, Plan(str(tmp_path), layout, ckpt_path="last", **saved)):
            assert not after.losses
            assert all(torch.equal(after.state[name], before.state[name]) for name in before.state)


@pytest.mark.s3
def test_the_plugin_puts_each_checkpoint_there_whole(
    forks: Forks, tmp_path: Path, s3: S3Server, place: Callable[[S3Server], str]
) -> None:
    """Lightning's own callback, with its own ways to keep and to find, over object storage and files."""
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    environ = {"AWS_ENDPOINT_URL_S3": s3.endpoint, **keys}
    saved = {"every_n_epochs": 1, "save_top_k": 1, "save_last": True}
    plan = Plan(str(tmp_path / "files"), "ddp", plugin=True, saved=saved, environ=environ, then_test="best")
    for root in (plan.root, place(s3)):
        whole = run(forks, plan.but(root=root))
        first, second = run(forks, plan.but(root=root, ckpt_path=f"{root}/last.ckpt", epochs=4))
        assert list(first.losses) == list(second.losses) == list(range(3 * EPOCH, 4 * EPOCH))
        assert first.seen["tested"] == second.seen["tested"]
        assert whole[0].seen["tested"]["test"] >= first.seen["tested"]["test"]
    names = sorted(path.name for path in Path(plan.root).iterdir())
    assert (len(names), names[-1]) == (2, "last.ckpt"), "what was best before is gone"
    with sc.CheckpointManager(tmp_path / "files" / "last.ckpt", sc.Gangs.local()) as checkpoints:
        assert len(checkpoints.steps()) == 1
        assert checkpoints.load_last_checkpoint()[1]["global_step"] == 4 * EPOCH
