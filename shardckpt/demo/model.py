"""A small decoder-only transformer over bytes, and how it is laid over a mesh of ("dp", "tp")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from shardckpt.demo.messages import ModelConfig

VOCABULARY = 256
"""Tokens are bytes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows `start : start + count` of a global batch of `total`: those of this data-parallel rank."""

    start: int
    count: int
    total: int


class SampleDropout(nn.Module):
    """Dropout whose mask for a sample does not depend on the mesh.

    Every rank draws the mask of the whole global batch from torch's CPU generator and keeps its own
    rows. So all ranks' generators stay in step, a run on another mesh drops the same elements, and a resume
    that does not restore the generator shows in the losses.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = torch.rand(rows.total, *x.shape[1:]) >= self.probability
        mine = keep[rows.start : rows.start + rows.count].to(x.device)
        return x * mine / (1.0 - self.probability)


class Attention(nn.Module):
    """Causal attention with rotary positions; the fused projection is laid out by head, so that it splits by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        by_head = self.qkv(x).view(batch, length, -1, 3, self.head_dim)  # under TP: this rank's heads only
        q, k, v = (part.transpose(1, 2) for part in by_head.unbind(3))
        mixed = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return y


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = Mlp(config)
        self.dropout = SampleDropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation), rows)
        y: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)), rows)
        return y


class Transformer(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.dropout = SampleDropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        cosine, sine = rotation_table(config.context, config.dim // config.heads)
        self.cosine: Tensor
        self.sine: Tensor
        self.register_buffer("cosine", cosine)
        self.register_buffer("sine", sine)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation; draws from torch's CPU generator, so seed it alike on every rank."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrink = math.sqrt(2 * self.config.layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, rows: Rows) -> Tensor:
        """tokens: int64 [rows.count, context]; gives float32 [rows.count, context, 256]."""
        length = tokens.shape[1]
        rotation = self.cosine[:length], self.sine[:length]
        x = self.dropout(self.embedding(tokens), rows)
        for block in self.blocks:
            x = block(x, rotation, rows)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotation_table(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864): two of [context, head_dim / 2]."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(context).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels by its position's angle; x: [batch, heads, length, head_dim]."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def shard(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Lay the model over the mesh in place: tensor parallel by head and by channel, then FSDP2 over "dp".

    Called on every rank with the same weights. A dimension of size 1 is left out, so (1, 1) is the plain
    model, (n, 1) is FSDP2 alone, (1, n) is tensor parallel alone.
    """
    if mesh["tp"].size() > 1:
        styles: dict[str, ParallelStyle] = {
            "attention.qkv": ColwiseParallel(),
            "attention.out": RowwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], styles, src_data_rank=None)  # None: the weights are alike already
    if mesh["dp"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
    return model


def split_over_tp(parameter: Tensor) -> bool:
    """True if tensor-parallel ranks hold different parts of it, so that their squares must be added in a norm."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == "tp" and isinstance(placement, Shard)
        for name, placement in zip(names, parameter.placements, strict=True)
    )


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the gradient, the very memory; called after `backward`."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
