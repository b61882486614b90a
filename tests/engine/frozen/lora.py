"""A tiny language model whose base is frozen, with low-rank adapters beside its weights. Real training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardckpt import RngState

WORDS, WIDTH, RANK = 64, 384, 2


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what is learnt beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, width) / width)
        self.lora_b = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class Model(nn.Module):
    def __init__(self, layers: int = 4, width: int = WIDTH, rank: int = RANK) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.embed.requires_grad_(False)
        self.layers = nn.ModuleList(Adapted(width, rank) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width, affine=False)  # buffers that change with every batch
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight  # tied, and frozen

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


def tuning(seed: int = 0, **shape: int) -> dict[str, Any]:
    """A state as a program hands it in; the base is the same for every seed."""
    torch.manual_seed(1)
    model = Model(**shape)
    torch.manual_seed(seed + 2)
    for layer in model.layers:
        nn.init.normal_(layer.lora_a, std=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": RngState()}


def tune(state: dict[str, Any], steps: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        words = torch.randint(0, WORDS, (32,))
        loss = nn.functional.cross_entropy(state["model"](words), words.roll(1))
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["optimizer"].zero_grad()
        losses.append(loss.item())
    return losses


def is_adapter(name: str) -> bool:
    return "lora_" in name


def content(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A private copy of the tensors of model and optimizer."""
    moments = state["optimizer"].state_dict()["state"]
    return {name: value.clone() for name, value in state["model"].state_dict().items()} | {
        f"{number}.{key}": value.clone() for number, those in moments.items() for key, value in those.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
