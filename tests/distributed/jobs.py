"""A small real training job that can be laid out over ranks in every way, and its state gathered by torch alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt as sc

WORDS, WIDTH, HIDDEN = 41, 20, 30
"""None is divided evenly by 4 ranks but the width, and that not by 4 twice."""


@dataclass(frozen=True)
class Layout:
    """How a job lies on its ranks: each dimension of the mesh, and what is done along "dp"."""

    dp: int
    tp: int = 1
    data: str = "fsdp"
    """fsdp: sharded over dp (not if that is 1); ddp: DistributedDataParallel; copies: alike, without a wrapper;
    hsdp: sharded over pairs of ranks, with copies of the pairs."""

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"{self.data}_{self.dp}x{self.tp}"

    def mesh(self) -> DeviceMesh:
        """Called by all ranks of the job."""
        if self.data == "hsdp":
            return init_device_mesh("cpu", (self.dp // 2, 2), mesh_dim_names=("replicate", "shard"))
        return init_device_mesh("cpu", (self.dp, self.tp), mesh_dim_names=("dp", "tp"))


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.up = nn.Linear(WIDTH, HIDDEN, dtype=dtype)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + y


class Net(nn.Module):
    """Tied words, blocks for TP, a frozen parameter, and buffers: of integers, 0-dim, empty."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, dtype=dtype)
        self.places = nn.Embedding(7, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False, dtype=dtype)
        nn.init.normal_(self.words.weight, std=0.1)
        self.head.weight = self.words.weight
        self.frozen = nn.Parameter(torch.randn(3, 5).to(dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros(WORDS, dtype=torch.int64))
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += torch.bincount(tokens.flatten(), minlength=WORDS)
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1])) + self.frozen.sum()
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        with torch.no_grad():
            self.mean += 0.1  # not of the logits, which TP sums up in another order
        return logits


class Job:
    """One job on its ranks: a model laid out, AdamW in two groups, a schedule. Every rank sees the same data."""

    def __init__(self, layout: Layout, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.mesh = layout, layout.mesh()
        for module in (torch, random, np.random):
            (module.manual_seed if module is torch else module.seed)(seed)  # type: ignore[attr-defined]
        self.model = Net(dtype)
        self.module: nn.Module = self.model
        self._lay_out()
        plain = [p for name, p in self.module.named_parameters() if name.endswith("bias") or "norm" in name]
        rest = [p for p in self.module.parameters() if not any(p is q for q in plain)]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2, foreach=False
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.9)
        self.progress: dict[str, Any] = {"step": 0, "losses": [], "best": None}

    def _lay_out(self) -> None:
        layout, model = self.layout, self.model
        if layout.tp > 1:
            plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
            for block in model.blocks:
                parallelize_module(block, self.mesh["tp"], plan)
            parallelize_module(model.places, self.mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
        if layout.data == "hsdp" or (layout.data == "fsdp" and layout.dp > 1):
            mesh = self.mesh if layout.data == "hsdp" else self.mesh["dp"]
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if layout.data == "ddp":
            self.module = nn.parallel.DistributedDataParallel(model)

    def train_step(self) -> float:
        """A real step; gives the loss. The data is that of the step."""
        generator = torch.Generator().manual_seed(1000 + self.progress["step"])
        tokens = torch.randint(0, WORDS, (4, 7), generator=generator)
        logits = self.module(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(1, 1).flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.progress["step"] += 1
        self.progress["losses"] = [*self.progress["losses"], 0.5 * self.progress["step"]]
        return loss.item()

    def state(self) -> dict[str, Any]:
        """What a program hands in."""
        return {
            "model": self.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "progress": self.progress,
            "rng": sc.RngState(),
        }

    def gathered(self) -> dict[str, Any]:
        """Everything that a checkpoint must bring back, by torch's own means. Called by all ranks."""
        optimizer = get_optimizer_state_dict(self.module, self.optimizer)
        found = {f"model {name}": value for name, value in get_model_state_dict(self.module).items()}
        for name, values in optimizer["state"].items():
            found |= {f"moment {name} {key}": value for key, value in values.items()}
        whole = {name: full(value) for name, value in found.items()}
        groups = [{**group, "params": sorted(group["params"])} for group in optimizer["param_groups"]]
        return {**whole, "groups": groups, "scheduler": self.scheduler.state_dict(), "progress": dict(self.progress)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def differences(one: MutableMapping[str, Any], other: MutableMapping[str, Any]) -> Iterator[str]:
    """The keys that are not the same bit for bit."""
    for key in sorted(one.keys() | other.keys()):
        if key not in one or key not in other:
            yield f"{key} (only in one)"
        elif isinstance(one[key], torch.Tensor):
            same = one[key].dtype == other[key].dtype and one[key].shape == other[key].shape
            if not same or not torch.equal(as_bytes(one[key]), as_bytes(other[key])):
                yield key
        elif one[key] != other[key]:
            yield f"{key}: {one[key]} != {other[key]}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def checkpoints(root: Path, mesh: DeviceMesh) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, sc.Gangs.from_mesh(mesh))


def keep_reference(file: Path, gathered: dict[str, Any]) -> None:
    """Rank 0 writes what all ranks of other jobs compare with."""
    if dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(gathered, file)
    dist.barrier()
