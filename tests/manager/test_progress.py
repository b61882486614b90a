"""`TrainingProgress`: what it counts, and that it comes back."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from shardckpt.format.manifest import decode_manifest
from shardckpt.testing.gangs import run_ranks

LIMIT = timedelta(seconds=20)


def test_it_counts_and_keeps_the_last_losses() -> None:
    progress = sc.TrainingProgress(most_losses=3)
    for loss in (5.0, None, 3.0, torch.tensor(2.0), 1.0):
        progress.advance(loss=loss)  # type: ignore[arg-type]
    progress.end_epoch()
    assert (progress.step, progress.epoch, progress.losses) == (5, 1, ((3, 3.0), (4, 2.0), (5, 1.0)))
    better = [progress.improves(value, lower_better=True) for value in (0.5, 0.6, float("nan"), 0.5, 0.4)]
    assert better == [True, False, False, False, True]
    assert (progress.best, progress.best_step) == (0.4, 5)
    assert progress.improves(9.0)


def test_it_comes_back_to_its_rank_and_from_rank_0_to_others(tmp_path: Path) -> None:
    def save(gangs: sc.Gangs) -> None:
        progress = sc.TrainingProgress()
        for step in range(4):
            progress.advance(loss=step + gangs.root.rank / 10)
        progress.end_epoch()
        progress.improves(0.5)
        with sc.CheckpointManager(tmp_path, gangs, timeout=LIMIT) as checkpoints:
            checkpoints.save(progress.step, {"progress": progress, "w": torch.ones(2)})

    def load(gangs: sc.Gangs) -> Any:
        progress, state = sc.TrainingProgress(most_losses=2), {"w": torch.zeros(2)}
        with sc.CheckpointManager(tmp_path, gangs, timeout=LIMIT) as checkpoints:
            assert checkpoints.resume({"progress": progress, **state}) is not None
        return progress.step, progress.epoch, progress.best, progress.best_step, progress.losses

    run_ranks(2, save)
    first = (4, 1, 0.5, 4, ((3, 2.0), (4, 3.0)))
    assert run_ranks(2, load) == [first, (*first[:4], ((3, 2.1), (4, 3.1)))]
    assert run_ranks(3, load) == [first] * 3
    record = decode_manifest((tmp_path / "step_4/manifest.json").read_bytes())
    assert max(len(table.values) for table in record.tables) <= 6, "the losses are one entry of the record"
