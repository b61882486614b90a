"""A training as the test plans of other systems ask for it: saved every n, few kept, damaged, resumed, and the same."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.format.manifest import decode_manifest
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import FailingStorage, on
from tests.storage import proxy
from tests.storage.conftest import place, s3
from tests.storage.proxy import Harm
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

KEEP = sc.KeepLast(3) | sc.KeepBest(1, lower_better=True)


def train(
    run: sc.Run | Storage, *, until: int, every: int = 10, failures: list[sc.CheckpointError] | None = None
) -> tuple[list[float], sc.CheckpointInfo | None, list[int]]:
    """The losses of this job, from where it was resumed, if it was; and the steps that there are afterwards.

    `failures`: where those of saves are put, and it goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20)
    progress, losses = sc.TrainingProgress(), list[float]()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state |= {"progress": progress, "rng": sc.RngState()}
    with sc.CheckpointManager(run, sc.Gangs.local(), keep=KEEP) as checkpoints:
        info = checkpoints.resume(state)
        schedule = checkpoints.schedule(sc.SaveEvery(steps=every), step=progress.step)
        while progress.step < until:
            inputs = torch.randn(8, 4)
            loss = (model(inputs) - inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            progress.advance(loss=losses[-1])
            if schedule.due(progress.step):
                wait(checkpoints, failures)
                checkpoints.save(progress.step, state)
                checkpoints.save_score(abs(progress.step - 40), step=progress.step)
        wait(checkpoints, failures)
    with sc.CheckpointManager(run, sc.Gangs.local()) as checkpoints:
        return losses, info, checkpoints.steps()


def wait(checkpoints: sc.CheckpointManager, failures: list[sc.CheckpointError] | None) -> None:
    try:
        checkpoints.wait()
    except sc.CheckpointSaveError as error:
        if failures is None:
            raise
        failures.append(error)


def damage(storage: Storage, step: int) -> None:
    """Flip a bit of the model."""
    record = decode_manifest(storage.read(f"step_{step}/manifest.json"))
    key = next(f"step_{step}/{file.name}" for file in record.files if file.kind == "model")
    content = bytearray(storage.read(key))
    content[len(content) // 2] ^= 1
    storage.replace(key, bytes(content))


@pytest.mark.s3
@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.sampled(2)
def test_train_prune_damage_resume(
    where: str, tmp_path: Any, s3: S3Server, place: Callable[[S3Server], str], caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path / "not there yet") if where == "local" else place(s3)
    options = None if where == "local" else dict(s3.options)
    with sc.Runs(root, sc.Gangs.local(), storage_options=options) as runs:
        whole, info, _ = train(runs.new(name="whole", config={"lr": 0.05}), until=110, every=1000)
        assert info is None

        run = runs.new(name="cut", config={"lr": 0.05})
        begun, _, steps = train(run, until=100)
        assert steps == [40, 80, 90, 100], "three of ten, and the best"
        best = run.best(lower_better=True)
        assert best is not None
        assert (best.step, best.metrics) == (40, {"score": 0.0})
        storage = run.open_storage()
        damage(storage, 100)
        storage.close()

        again = runs.open("cut", config={"lr": 0.01})
        assert [str(difference) for difference in again.differences] == ["lr: 0.05 is now 0.01"]
        rest, info, steps = train(again, until=110)
        assert info is not None
        assert (info.step, [step for step, _ in info.skipped]) == (90, [100])
        assert "step 100 is passed over" in caplog.text
        assert begun[:90] + rest == whole, "bit for bit, with dropout, momentum and the batches"
        assert steps == [40, 90, 100, 110], "the one that was resumed from is among the last three"
        assert [saved.step for saved in again.look().history] == list(range(10, 111, 10))


@contextmanager
def filling(where: str, tmp_path: Any, s3: S3Server, url: str) -> Iterator[Storage]:
    """A place that is full as soon as anything of step 30 is put there. (`tests/faults/test_full_disk.py` has file
    systems that are.)"""
    if where == "local":
        full = OSError(errno.ENOSPC, "the file system is full (or out of inodes): free space")
        yield FailingStorage(LocalStorage(tmp_path), on("put", key="step_30"), times=None, error=lambda: full)
        return
    with proxy.before(s3.endpoint) as harmful:
        harmful.harm(Harm.FULL, "put", "create_upload", key="step_30", times=1000)
        yield S3Server(harmful.endpoint, s3.bucket, s3.access_key, s3.secret_key).storage(url)


@pytest.mark.s3
@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
@pytest.mark.parametrize("where", ["local", "s3"])
def test_the_place_is_full_in_the_middle(
    where: str, tmp_path: Any, s3: S3Server, place: Callable[[S3Server], str]
) -> None:
    """That save fails and says why, training goes on, the steps before stay; the next job goes on from them."""
    url = place(s3)
    whole, _, _ = train(LocalStorage(tmp_path / "whole"), until=50, every=1000)
    failures: list[sc.CheckpointError] = []
    with filling(where, tmp_path / "run", s3, url) as full:
        begun, _, steps = train(full, until=35, failures=failures)
    assert begun == whole[:35]
    assert [error.step for error in failures] == [30]
    assert "is full" in str(failures[0])
    assert "free space" in str(failures[0])
    assert steps == [10, 20]
    roomy = LocalStorage(tmp_path / "run") if where == "local" else s3.storage(url)
    rest, info, steps = train(roomy, until=50)
    assert info is not None
    assert (info.step, begun[:20] + rest) == (20, whole)
    assert steps == [20, 30, 40, 50]
