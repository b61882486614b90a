"""A job of many ranks as one of them sees it: its place on the mesh, and its state. No process group, and no memory.

Every tensor of a rank has its true local shape, on a true `DeviceMesh`, but all its elements are one and the same byte
of memory (stride 0): a plan looks at names, shapes, dtypes, strides, placements and addresses, never at elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardckpt.engine.coordinates import Coordinates
from shardckpt.format.placement import local_shape, shard_boxes


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks, and how they share a model. Ranks are numbered (dp, pp, tp), tp fastest, as `Gangs` does it."""

    dp: int
    """FSDP2."""
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """Ranks of one stage, tensor-parallel ones among them, over which whole experts are spread."""
    replicas: int = 1
    """HSDP: of the `dp` ranks, groups that hold the same."""

    def __post_init__(self) -> None:
        if (self.dp * self.tp) % self.ep or self.dp % self.replicas:
            raise ValueError(f"ep={self.ep} does not divide dp x tp, or replicas={self.replicas} does not divide dp")

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def label(self) -> str:
        named = (("FSDP", self.dp), ("TP", self.tp), ("PP", self.pp), ("EP", self.ep), ("replicas", self.replicas))
        return " x ".join(f"{name} {size}" for name, size in named if size > 1 or name == "FSDP")

    def coordinates(self, rank: int) -> Coordinates:
        """As `Coordinates.of` gives them for gangs of this job."""
        block = self.tp * self.pp
        stage = rank % block - rank % self.tp
        lanes = tuple(tuple(range(stage + tp, self.ranks, block)) for tp in range(self.tp))
        own = tuple(range(rank % block, self.ranks, block))
        return Coordinates(rank, self.ranks, rank % block, block, own, lanes)

    def stage_of(self, rank: int) -> int:
        return rank // self.tp % self.pp


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter; `cut` is the dimension that tensor parallelism (of an expert: FSDP) splits."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None
    layer: int = 0
    is_expert: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer: dense, or with experts (stacked, as torchtitan has them) in place of its feed-forward layers."""

    layers: int
    width: int
    inner: int
    vocabulary: int = 32_000
    experts: int = 0

    @classmethod
    def with_tensors(cls, tensors: int, *, experts: int = 0, width: int = 16_384) -> Model:
        """As many layers as make about so many tensors (parameters and two moments of each)."""
        per_layer = len(list(cls(1, width, width, experts=experts).weights())) - 3
        return cls(max(1, (tensors // 3 - 3) // per_layer), width, width * 13 // 4 // 256 * 256, 128_256, experts)

    @property
    def parameters(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.weights())

    def weights(self) -> Iterator[Weight]:
        wide, inner = self.width, self.inner
        yield Weight("embed.weight", (self.vocabulary, wide), 0)
        for layer in range(self.layers):
            here = f"layers.{layer}"
            for name, rows, cut in (("q", wide, 0), ("k", wide // 16, 0), ("v", wide // 16, 0), ("o", wide, 1)):
                yield Weight(f"{here}.attention.{name}.weight", (rows, wide), cut, layer)
            if self.experts:
                yield Weight(f"{here}.router.weight", (self.experts, wide), None, layer)
                for name, shape in (("w1", (inner, wide)), ("w2", (wide, inner)), ("w3", (inner, wide))):
                    yield Weight(f"{here}.experts.{name}", (self.experts, *shape), 1, layer, is_expert=True)
            else:
                for name, shape, cut in (("w1", (inner, wide), 0), ("w2", (wide, inner), 1), ("w3", (inner, wide), 0)):
                    yield Weight(f"{here}.mlp.{name}.weight", shape, cut, layer)
            for name in ("attention_norm", "mlp_norm"):
                yield Weight(f"{here}.{name}.weight", (wide,), None, layer)
        yield Weight("norm.weight", (wide,), None, self.layers - 1)
        yield Weight("output.weight", (self.vocabulary, wide), 0, self.layers - 1)


LLAMA_405B = Model(126, 16_384, 53_248, 128_256)


@dataclass
class Rank:
    """One rank of a job, with its state: a module, AdamW that has stepped, and a few values of its own."""

    mesh: Mesh
    model: Model
    rank: int
    _memory: torch.Tensor = field(default_factory=lambda: torch.zeros(1 << 20, dtype=torch.uint8), repr=False)
    _used: int = 0

    @property
    def coordinates(self) -> Coordinates:
        return self.mesh.coordinates(self.rank)

    def state(self) -> dict[str, Any]:
        """Made anew by each call; tensors of all calls are the same memory."""
        self._used = 0
        self.pretend()
        own = self.mesh.stage_of(self.rank)
        dense, expert = self._meshes()
        model = Tree(nn.Module())
        parameters = {}
        for weight in self.model.weights():
            if weight.layer * self.mesh.pp // self.model.layers == own:
                parameter = nn.Parameter(self._tensor(weight, expert if weight.is_expert else dense, torch.bfloat16))
                parameters[weight] = parameter
                model.put(weight.name, parameter)
        optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4)
        for weight, parameter in parameters.items():
            mesh = expert if weight.is_expert else dense
            moments = {kind: self._tensor(weight, mesh, torch.float32) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(100.0), **moments}
        own_values = {"epoch": 3, "batch": 100 * self.rank, "seed": f"{self.rank:064x}"}
        return {"model": model.module, "optimizer": optimizer, "data": own_values, "progress": {"step": 100}}

    def pretend(self) -> None:
        """From now on this process is that rank, as far as torch knows; it can talk to nobody."""
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.mesh.ranks)

    def _meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """Of what is dense (all but the pipeline's dimension), and of experts."""
        mesh, ranks = self.mesh, torch.arange(self.mesh.ranks)
        dp: tuple[int, ...] = (mesh.replicas, mesh.dp // mesh.replicas) if mesh.replicas > 1 else (mesh.dp,)
        names = ("replicate", "shard") if mesh.replicas > 1 else ("dp",)
        dense = _mesh(ranks.view(*dp, mesh.pp, mesh.tp), (*names, "pp", "tp"), (*names, "tp"))
        spread = ranks.view(mesh.dp, mesh.pp, mesh.tp).transpose(0, 1).reshape(mesh.pp, -1, mesh.ep)
        return dense, _mesh(spread, ("pp", "edp", "ep"), ("edp", "ep"))

    def _tensor(self, weight: Weight, mesh: DeviceMesh, dtype: torch.dtype) -> DTensor:
        placements = self._placements(weight, mesh)
        sizes = tuple(mesh.shape)
        texts = ["R" if p.is_replicate() else _text(p) for p in placements]
        boxes = shard_boxes(weight.shape, sizes, texts, tuple(cast("Any", mesh.get_coordinate())))
        shape = local_shape(boxes, len(weight.shape)) if boxes else (0, *weight.shape[1:])
        stride = torch.empty(weight.shape, device="meta").stride()
        local = self._next(dtype).expand(shape)
        size = torch.Size(weight.shape)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)

    def _placements(self, weight: Weight, mesh: DeviceMesh) -> list[Any]:
        """As FSDP2 makes them of what tensor parallelism made: rows first by tp, then by dp."""
        if weight.is_expert:
            return [Shard(1), Shard(0)]
        before: list[Any] = [Replicate()] if self.mesh.replicas > 1 else []
        if weight.cut is None:
            return [*before, Shard(0), Replicate()]
        rows = _StridedShard(0, split_factor=self.mesh.tp) if weight.cut == 0 and self.mesh.tp > 1 else Shard(0)
        return [*before, rows, Shard(weight.cut)]

    def _next(self, dtype: torch.dtype) -> torch.Tensor:
        """Memory for one element, which no other tensor has."""
        at, self._used = self._used, self._used + 8
        return self._memory[at : at + dtype.itemsize].view(dtype)


def _text(placement: Any) -> str:
    factor = getattr(placement, "split_factor", None)
    return f"S({placement.dim})" if factor is None else f"SS({placement.dim},{factor})"


def _mesh(grid: torch.Tensor, dims: tuple[str, ...], kept: tuple[str, ...]) -> DeviceMesh:
    """The dimensions that are kept, of a mesh that equals that of no other rank: torch remembers meshes as equal that
    are only seen from other ranks. Its own ranks in threads are told apart in this way."""
    whole: Any = DeviceMesh("cpu", grid, mesh_dim_names=dims, _init_backend=False)
    whole._dim_group_names = [f"none{dim}" for dim in range(whole.ndim)]  # slicing looks them up
    part: Any = whole[kept]
    for mesh in (whole, part):
        mesh._thread_id, mesh._hash = dist.get_rank(), None
    return cast("DeviceMesh", part)


@dataclass(frozen=True, slots=True)
class Tree:
    """A module that grows by the names of its parameters."""

    module: nn.Module

    def put(self, name: str, parameter: nn.Parameter) -> None:
        *path, last = name.split(".")
        node = self.module
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = cast("nn.Module", node._modules[part])
        node.register_parameter(last, parameter)
