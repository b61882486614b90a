"""Trainings in which something is not as it should be. By forked ranks."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.integrations.lightning.plans import Plan


def train_with(rank: int, world_size: int, folder: Path, plan: Plan, how: str) -> dict[str, Any]:
    """How it ended, and what this rank takes for the best; `how` names one of the modules below. Of several ranks one
    that fails ends."""
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    from shardckpt.integrations.lightning import callback, checkpoints
    from tests.integrations.lightning.training import Module, trainer_of

    class Uneven(Module):
        """What it logs is each rank's own, and on one of them no number."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            own = 1.0 + self.current_epoch if rank == 0 else math.nan if self.current_epoch else 5.0
            self.log("own", own)

    class Fails(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if rank == world_size - 1 and self.trainer.global_step == 3:
                raise KeyError("its own")

    callback._LAST_TRY = timedelta(seconds=2)
    seed_everything(1)
    module = {"uneven": Uneven, "fails": Fails, "plain": Module}[how](8)
    data = TensorDataset(torch.randn(16, 4))
    made = checkpoints(ModelCheckpoint(plan.root, **{"monitor": "val", **plan.saved}), **plan.terms)
    trainer, ended = trainer_of(plan, made, world_size, folder), "well"
    try:
        trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    except Exception as error:
        if world_size > 1:
            raise
        ended = f"{type(error).__name__}: {error}"
    return {
        "ended": ended,
        "best": Path(made.best_model_path).name,
        "k": sorted(map(float, made.best_k_models.values())),
    }


def fails_on_an_older_lightning(rank: int, world_size: int, folder: Path, plan: Plan) -> dict[str, Any]:
    """2.5.0 has no `save_on_exception`, and no `weights_only` where it loads."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from shardckpt.integrations.lightning import checkpoint_io

    del pl.callbacks.ModelCheckpoint._should_save_on_exception
    made = pl.callbacks.ModelCheckpoint.__init__

    def older(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        del self.save_on_exception

    pl.callbacks.ModelCheckpoint.__init__ = older
    file = folder / "theirs.ckpt"
    torch.save({"theirs": 1}, file)
    TorchCheckpointIO.load_checkpoint = lambda self, path, map_location=None: torch.load(path, map_location)
    theirs = checkpoint_io().load_checkpoint(file)
    return {"theirs": theirs, **train_with(rank, world_size, folder, plan, "fails")}
