"""One small model that can be laid out by every parallelism, the hand-written ones too: the same losses in all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

WORDS, WIDTH, HIDDEN, LAYERS, EXPERTS, LENGTH = 41, 20, 24, 4, 4, 8


class _Enter(torch.autograd.Function):
    """Into what each rank does a part of: its gradients are summed up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        dist.all_reduce(grad := grad.contiguous().clone(), group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """Out of it: the parts are summed up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        dist.all_reduce(x := x.contiguous().clone(), group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Block(nn.Module):
    """A layer of two matrices, and a mixture of experts."""

    def __init__(self, experts: Iterable[int], hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleDict({str(number): nn.Linear(WIDTH, WIDTH, bias=False) for number in experts})

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y

    def mixture(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Of the experts that are here."""
        parts = [gates[..., int(number), None] * expert(x) for number, expert in self.experts.items()]
        return torch.stack(parts).sum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.matrices(x)
        return x + self.mixture(x, self.router(x).softmax(-1))


class SequenceBlock(Block):
    """Between its matrices, and in its norm, the ranks of `mesh` have a part of the sequence each."""

    mesh: DeviceMesh

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        shared = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)])
        return super().matrices(shared).full_tensor()  # type: ignore[attr-defined]


class PlainBlock(Block):
    """Each rank of `group` has a part of the matrices, in plain tensors."""

    group: Any

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(_Enter.apply(self.norm(x), self.group)))
        whole: torch.Tensor = _Leave.apply(nn.functional.linear(hidden, self.down.weight), self.group)
        return whole + self.down.bias


class ExpertBlock(Block):
    """Each rank of `group` has some of the experts."""

    group: Any

    def mixture(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        enter = (_Enter.apply(value, self.group) for value in (x, gates))
        mixed: torch.Tensor = _Leave.apply(super().mixture(*enter), self.group)
        return mixed


class Stem(nn.Module):
    """Words, a frozen parameter, and buffers: of integers, and 0-dim."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(WORDS, dtype=torch.int64))
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += torch.bincount(tokens.flatten(), minlength=WORDS)
            self.mean += 0.1
        x: torch.Tensor = self.words(tokens)
        return x + self.frozen.sum()


class Net(nn.Module):
    """All of it, or one of several stages of a pipeline."""

    def __init__(
        self, kind: type[Block], *, experts: Iterable[int], hidden: int = HIDDEN, stage: int = 0, stages: int = 1
    ) -> None:
        super().__init__()
        numbers = range(stage * LAYERS // stages, (stage + 1) * LAYERS // stages)
        self.stem = Stem() if stage == 0 else None
        self.blocks = nn.ModuleDict({str(number): kind(experts, hidden) for number in numbers})
        self.head = nn.Linear(WIDTH, WORDS, bias=False) if stage == stages - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.stem is None else self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def batch(step: int) -> torch.Tensor:
    """The tokens of a step, the same on all ranks."""
    return torch.randint(0, WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(1000 + step))


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())


def through_stages(net: nn.Module, tokens: torch.Tensor, *, group: Any, stage: int, stages: int) -> float:
    """Forwards and backwards through a pipeline; the loss, on every stage of it."""
    ranks = dist.get_process_group_ranks(group)
    before, after = ranks[stage - 1], ranks[(stage + 1) % stages]
    x, loss = tokens, torch.zeros(())
    if stage:
        dist.recv(x := torch.empty(*tokens.shape, WIDTH), before, group=group)
        x.requires_grad_()
    y = net(x)
    if stage == stages - 1:
        (found := loss_of(y, tokens)).backward()
        loss = found.detach().clone()
    else:
        dist.send(y.detach().contiguous(), after, group=group)
        dist.recv(grad := torch.empty_like(y), after, group=group)
        y.backward(grad)
    if stage:
        assert x.grad is not None
        dist.send(x.grad.contiguous(), before, group=group)
    dist.broadcast(loss, ranks[-1], group=group)
    return loss.item()
