"""Lightning, saved and resumed: `torchrun --nproc-per-node 2 launch/train_lightning.py`, or without torchrun. Stop it,
run it again, also with another number of processes.

Two arguments, if any: where the checkpoints go (a path, or any URL that fsspec opens), and how many epochs.
"""

import os
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from shardckpt.integrations.lightning import checkpoints

root, epochs = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("runs/lightning", 5)


class Reverse(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = (self.net(batch[0]) - batch[0].flip(1)).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch} loss {self.trainer.callback_metrics['loss']:.4f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
ranks = int(os.environ.get("WORLD_SIZE", "1"))
trainer = Trainer(
    accelerator="cpu",
    devices=ranks,
    strategy="auto" if ranks == 1 else ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
    max_epochs=epochs,
    callbacks=[checkpoints(ModelCheckpoint(root, monitor="loss", save_top_k=2, every_n_train_steps=20))],
    enable_progress_bar=False,
    logger=False,
)
data = TensorDataset(torch.randn(1000, 16))
trainer.fit(Reverse(), StatefulDataLoader(data, batch_size=20), ckpt_path="last")
