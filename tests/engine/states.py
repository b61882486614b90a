"""Small real states for the engine's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardckpt import RngState


class Net(nn.Module):
    """Parameters of several sizes, a large one (its record begins on a page), buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 300)
        self.norm = nn.BatchNorm1d(300)
        self.body = nn.Linear(300, 300)
        self.head = nn.Linear(300, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.norm(self.embed(tokens)))))


class Counter:
    """Something with `state_dict` whose keys grow."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def count(self, word: str) -> None:
        self.seen[word] = self.seen.get(word, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen), "histogram": torch.tensor(list(self.seen.values()), dtype=torch.int32)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])
        assert state["histogram"].tolist() == list(self.seen.values())


def training(seed: int = 0) -> dict[str, Any]:
    """A state as a program hands it in."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    counter = Counter()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "counter": counter,
        "rng": RngState(),
        "progress": {"step": 0, "losses": [], "last": torch.zeros(3, dtype=torch.float64)},
        "nothing": {},
    }


def train(state: dict[str, Any], steps: int) -> list[float]:
    """Real steps on random tokens; gives the losses."""
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 64, (16,))
        loss = nn.functional.cross_entropy(state["model"](tokens), tokens.roll(1))
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["counter"].count(f"step {len(state['counter'].seen)}")
        losses.append(loss.item())
        state["progress"]["step"] += 1
        state["progress"]["losses"] = [*state["progress"]["losses"], loss.item()]
        state["progress"]["last"] += loss.item()
    return losses


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A deep private copy of all that a save must keep."""
    optimizer = state["optimizer"].state_dict()
    return {
        "model": {k: v.clone() for k, v in state["model"].state_dict().items()},
        "moments": {(i, k): v.clone() for i, s in optimizer["state"].items() for k, v in s.items()},
        "groups": [dict(group) for group in optimizer["param_groups"]],
        "scheduler": dict(state["scheduler"].state_dict()),
        "counter": dict(state["counter"].seen),
        "progress": {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state["progress"].items()},
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    for part in ("model", "moments"):
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            assert value.dtype == other[part][key].dtype
            assert torch.equal(value, other[part][key]), f"{part} {key}"
    for part in ("groups", "scheduler", "counter"):
        assert one[part] == other[part], part
    assert torch.equal(one["progress"]["last"], other["progress"]["last"])
    assert one["progress"]["losses"] == other["progress"]["losses"]
