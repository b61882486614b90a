"""What is saved: states of known shape and seeded content, the same in every process that is given the same numbers.

The content is drawn from a normal distribution and is never zero: file systems and memory have short cuts for zeros.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed.tensor as distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

_BYTES_PER_PARAMETER = 10
"""A bfloat16 parameter with two float32 moments."""
_HEADS, _KV_HEADS = 8, 2
_SEED = 20261100
_BLOCK = 1 << 22
"""Elements of the noise that everything is cut from: drawing a gigabyte of normal numbers takes seconds."""
_LORA_RANK, _LORA_WIDTH = 8, 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Which state, and how large: all that a process needs to know to make it."""

    name: str
    """"A": a Llama-style model in bfloat16 with float32 AdamW moments. "B": many small tensors. "C": one large tensor.
    "D": LoRA adapters with their moments."""
    nbytes: int
    """Of A and of C, over all ranks, approximately; B and D are as large as their tensors make them."""
    layers: int = 8
    """Of A: 8 make 75 parameters, and 300 tensors with moments and step counts. Of D: 8 make 448 tensors."""
    count: int = 20_000
    """Of B."""
    item_nbytes: int = 4096
    """Of each tensor of B, over all ranks."""
    tokens: int = 128
    """Of one training step of A, on each rank."""
    width: int = _LORA_WIDTH
    """Of the model that D adapts."""

    @property
    def label(self) -> str:
        """The name, with the size if that can be chosen."""
        return f"{self.name}, {self.nbytes / 1e9:g} GB" if self.name in "AC" else self.name

    def shrunk(self) -> Shape:
        """The same tensors by number and name with almost no bytes: what saving them costs is the engine's own."""
        return replace(self, nbytes=0, item_nbytes=4, tokens=1, width=8)


class State:
    """One state on this rank: `live` is what a training program would hand over, `tensors` the very same tensors, flat.

    `live` is given to the engine that takes modules and optimizers apart itself, `tensors` to those that want a dict;
    the time that a user of the latter spends on `get_state_dict` is left out, in their favour.
    """

    def __init__(self, live: dict[str, Any], tensors: dict[str, torch.Tensor], rank: int) -> None:
        self.live = live
        self.tensors = tensors
        self._rank = rank
        self._noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(_SEED))
        self._work = torch.randn(512, 512)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(local.numel() * local.element_size() for _, local in self.locals())

    def locals(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, the plain tensor that lies on this rank) of everything."""
        for name, tensor in self.tensors.items():
            yield name, _local(tensor)

    def fill(self, generation: int) -> None:
        """Give every tensor content that follows from its name and `generation`: the same whole on any mesh."""
        for name, tensor in self.tensors.items():
            start = zlib.crc32(f"{generation}/{name}".encode()) + self._first(tensor)
            _fill(_local(tensor).detach().view(-1), self._noise, start, positive=name.endswith(("exp_avg_sq", "step")))

    def digests(self) -> dict[str, int]:
        """What the state is, tensor by tensor."""
        return {name: zlib.crc32(_bytes(local)) for name, local in self.locals()}

    def compute(self) -> None:
        """What stands for the forward and backward pass of a training step: keeps the processor busy."""
        for _ in range(4):
            self._work = torch.tanh(self._work @ self._work)

    def update(self) -> None:
        """The optimizer step that ends it. Only A has one, and it changes everything."""

    def _first(self, tensor: torch.Tensor) -> int:
        """The number, in the whole tensor, of the first element that lies on this rank."""
        if not isinstance(tensor, DTensor):
            return 0
        rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # as `torch.chunk` cuts
        return min(self._rank * rows, tensor.shape[0]) * math.prod(tensor.shape[1:])


class _Training(State):
    """A state that trains: what an asynchronous save has to keep out of the way of."""

    def __init__(self, model: Llama, optimizer: MixedAdamW, rank: int, tokens: int) -> None:
        tensors: dict[str, torch.Tensor] = {f"model.{name}": p for name, p in model.named_parameters()}
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, values in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
        super().__init__({"model": model, "optimizer": optimizer}, tensors, rank)
        self._model = model
        self._optimizer = optimizer
        draw = torch.Generator().manual_seed(_SEED + rank)
        self._text = torch.randint(model.vocabulary, (1, tokens + 1), generator=draw)

    def compute(self) -> None:
        """The forward and backward pass: changes nothing that is saved."""
        self._optimizer.zero_grad()
        logits = self._model(self._text[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), self._text[0, 1:]).backward()

    def update(self) -> None:
        self._optimizer.step()


class Llama(nn.Module):
    """A small decoder-only transformer; it need not learn, but has its tensors and its work per token."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, dtype=torch.bfloat16)
        self.output = _linear(width, vocabulary)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(text)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.output(self.norm(hidden))
        return logits


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        narrow, wide = width // _HEADS * _KV_HEADS, _wide(width)
        self.attention_norm = nn.RMSNorm(width, dtype=torch.bfloat16)
        self.query, self.key = _linear(width, width), _linear(width, narrow)
        self.value, self.attention_output = _linear(width, narrow), _linear(width, width)
        self.feed_norm = nn.RMSNorm(width, dtype=torch.bfloat16)
        self.gate, self.up, self.down = _linear(width, wide), _linear(width, wide), _linear(wide, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(hidden)
        query = _heads(self.query(normed), _HEADS)
        key, value = (_heads(part(normed), _KV_HEADS) for part in (self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + self.attention_output(mixed.transpose(1, 2).flatten(-2))
        normed = self.feed_norm(hidden)
        fed: torch.Tensor = hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return fed


class MixedAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments beside bfloat16 parameters, which torch's own gives the parameters' dtype."""

    def __init__(self, model: nn.Module, lr: float = 1e-4) -> None:
        super().__init__(model.parameters(), {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})
        for parameter in model.parameters():
            moments = {key: torch.empty_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.ones(()), **moments}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # never with a closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = {key: _local(value) for key, value in self.state[parameter].items()}
        weight, gradient = _local(parameter.detach()), _local(parameter.grad).float()
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = state["step"].item()
        scale = state["exp_avg_sq"].div(1 - beta2**step).sqrt_().add_(group["eps"])
        weight.mul_(1 - lr * group["weight_decay"]).addcdiv_(state["exp_avg"], scale, value=-lr / (1 - beta1**step))


def make(shape: Shape, *, rank: int, mesh: DeviceMesh | None) -> State:
    """The state of that shape on this rank, filled. A mesh (one dimension, all ranks) shards it, A with FSDP2."""
    state = _make_model(shape, rank, mesh) if shape.name == "A" else _make_plain(shape, rank, mesh)
    state.fill(0)
    return state


def _make_model(shape: Shape, rank: int, mesh: DeviceMesh | None) -> State:
    width, vocabulary = _dimensions(shape)
    with torch.device("meta"):
        model = Llama(width, shape.layers, vocabulary)
    if mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    return _Training(model, MixedAdamW(model), rank, shape.tokens)


def _dimensions(shape: Shape) -> tuple[int, int]:
    """(width, vocabulary): layers take at most half of the parameters, embedding and output the rest."""
    parameters = shape.nbytes // _BYTES_PER_PARAMETER
    width = 64
    while _layer_parameters(width + 64) * shape.layers <= parameters // 2:
        width += 64
    rest = parameters - shape.layers * _layer_parameters(width)
    return width, max(64, round(rest / (2 * width) / 64) * 64)


def _layer_parameters(width: int) -> int:
    return width * (2 * width + 2 * (width // _HEADS * _KV_HEADS) + 3 * _wide(width))


def _wide(width: int) -> int:
    return math.ceil(width * 8 / 3 / 64) * 64


def _make_plain(shape: Shape, rank: int, mesh: DeviceMesh | None) -> State:
    """B, C and D: tensors in nested dicts, split by rows."""
    tensors: dict[str, torch.Tensor] = {}
    live: dict[str, dict[str, torch.Tensor]] = {}
    for name, dims, dtype in _plain_tensors(shape):
        if mesh is None or not dims:
            tensor = torch.empty(dims, dtype=dtype)
        else:
            tensor = distributed.empty(dims, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        group, _, below = name.partition(".")
        tensors[name] = live.setdefault(group, {})[below] = tensor
    return State(dict(live), tensors, rank)


def _plain_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, dimensions, dtype) of every tensor of B, C or D."""
    if shape.name == "B":
        for number in range(shape.count):
            yield f"table.{number:05d}", (shape.item_nbytes // 4,), torch.float32
    elif shape.name == "C":
        yield "one.large", (max(1, shape.nbytes // 4096), 1024), torch.float32
    for layer in range(shape.layers if shape.name == "D" else 0):
        for part in ("query", "key", "value", "attention_output", "gate", "up", "down"):
            for side, dims in (("a", (_LORA_RANK, shape.width)), ("b", (shape.width, _LORA_RANK))):
                name = f"{layer}.{part}.lora_{side}"
                yield f"adapters.{name}", dims, torch.bfloat16
                yield f"moments.{name}.exp_avg", dims, torch.float32
                yield f"moments.{name}.exp_avg_sq", dims, torch.float32
                yield f"moments.{name}.step", (), torch.float32


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


def _heads(projected: torch.Tensor, count: int) -> torch.Tensor:
    heads: torch.Tensor = projected.unflatten(-1, (count, -1)).transpose(1, 2)
    return heads


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _fill(flat: torch.Tensor, noise: torch.Tensor, start: int, *, positive: bool) -> None:
    """Element i is element `start + i` of the noise, which repeats itself."""
    at = 0
    while at < flat.numel():
        first = (start + at) % _BLOCK
        piece = flat[at : at + _BLOCK - first]
        piece.copy_(noise[first : first + piece.numel()]).mul_(0.02)
        if positive:
            piece.abs_().add_(1e-6)
        at += piece.numel()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
