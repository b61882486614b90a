"""A trainer in torchtitan's style, saved and resumed: `torchrun --nproc-per-node 2 launch/train_titan.py`, or without
torchrun. Stop it, run it again, also with another number of processes.

Two arguments, if any: where the checkpoints go (a path, or any URL that fsspec opens), and the last step. In torchtitan
0.2 itself this is one line: `from shardckpt.integrations.titan import Checkpointer as CheckpointManager`.
"""

import sys
from typing import Any

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from shardckpt.integrations.titan import CheckpointConfig, Checkpointer


class Trainer:
    def __init__(self, config: CheckpointConfig, last_step: int) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
        if torch.distributed.is_initialized():
            fully_shard(self.model)
            torch.manual_seed(torch.distributed.get_rank())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, last_step)
        self.step, self.last_step = 0, last_step
        self.checkpointer = Checkpointer(
            config=config,
            model_parts=[self.model],
            optimizers=self.optimizer,
            lr_schedulers=self.scheduler,
            states={"train_state": self},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def train(self) -> None:
        self.checkpointer.load()
        while self.step < self.last_step:
            self.step += 1
            inputs = torch.randn(32, 16)
            loss = (self.model(inputs) - inputs.flip(1)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizer.step()
            self.scheduler.step()
            if self.step % 20 == 0:
                print(f"step {self.step} loss {loss:.4f}", flush=True)
            self.checkpointer.save(self.step, last_step=self.step == self.last_step)
        self.checkpointer.close()


folder, last = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("runs/titan", 200)
if sc.Gangs.from_env().root.size > 1:
    init_process_group("gloo")
Trainer(CheckpointConfig(folder=folder, interval=20, keep_latest_k=3), last).train()
if torch.distributed.is_initialized():
    destroy_process_group()
