"""A small training of Lightning, on each of its layouts. Done by forked ranks, which have imported Lightning before."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from shardckpt.integrations.lightning import checkpoint_io, checkpoints
from tests.integrations.lightning.plans import EPOCH, Plan, Result

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int, kill_at: int = -1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["kill_at"])
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))
        self.dropout = nn.Dropout(0.2)
        self.losses: dict[int, float] = {}
        self.kill_at = kill_at

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or any(hasattr(p, "placements") for p in self.parameters()):
            return
        if mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        else:
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.kill_at and self.trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = (self.dropout(self.net(batch[0])) - batch[0]).square().mean()
        self.losses[self.trainer.global_step] = loss.item()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.net(batch[0]) - batch[0]).square().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", (self.net(batch[0]) - batch[0]).square().mean(), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"losses": len(self.losses)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint.get("mine")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, foreach=False)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer_of(plan: Plan, callback: Any, world_size: int, folder: Path) -> pl.Trainer:
    strategy: Any = "auto"
    if plan.layout == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    elif plan.layout in ("fsdp2", "tp"):
        tp = 2 if plan.layout == "tp" else 1
        sizes = {"data_parallel_size": world_size // tp, "tensor_parallel_size": tp}
        strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo")
    plugins: list[Any] = [TorchElasticEnvironment()] if world_size > 1 else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[callback, EarlyStopping("val", patience=100)],
        plugins=[*plugins, *([checkpoint_io()] if plan.plugin else [])] or None,
        default_root_dir=folder,
        **{"max_epochs": plan.epochs, **quiet, **plan.trainer},
    )


def order(data: Any, rank: int, plan: Plan) -> dict[str, Any]:
    """On several ranks a sampler of one's own. 2026-11: Lightning hides that of `StatefulDataLoader(shuffle=True)` in
    another, so that no state has its generator."""
    if plan.layout == "one":
        return {"shuffle": True}
    replicas, rank = (1, 0) if plan.layout == "tp" else (2, rank)
    return {"sampler": StatefulDistributedSampler(data, replicas, rank, seed=3)}


def train(rank: int, world_size: int, folder: Path, plan: Plan) -> Result:
    os.environ.update(plan.environ)
    pl.seed_everything(1)
    generator = torch.Generator().manual_seed(0)
    data, val = (TensorDataset(torch.randn(size, 4, generator=generator)) for size in (8 * EPOCH, 8))
    loader = (DataLoader if plan.plain_loader else StatefulDataLoader)(data, batch_size=4, **order(data, rank, plan))
    module = Module(8, plan.kill_at)
    callback = ModelCheckpoint(plan.root, **{"monitor": "val", "save_top_k": 2, **plan.saved})
    if not plan.plugin and not plan.theirs:
        callback = checkpoints(callback, **plan.terms)
    trainer = trainer_of(plan, callback, world_size, folder)
    trainer.fit(module, loader, DataLoader(val, 4), ckpt_path=plan.ckpt_path)
    with torch.no_grad():
        state = {name: getattr(p, "full_tensor", lambda p=p: p)().clone() for name, p in module.state_dict().items()}
    seen = {"mine": getattr(module, "mine", None), "k": dict(callback.best_k_models)}
    if plan.then_test:
        seen["tested"] = trainer.test(module, DataLoader(val, 4), ckpt_path=plan.then_test, verbose=False)[0]
    return Result(module.losses, callback.best_model_path, callback.last_model_path, state, seen)
