"""The parallelisms of the matrix: the model of `parallel_net`, laid out by each of them, with its optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import shardckpt as sc
from tests.distributed.jobs import as_bytes, full
from tests.distributed.parallel_net import (
    EXPERTS,
    HIDDEN,
    Block,
    ExpertBlock,
    Net,
    PlainBlock,
    SequenceBlock,
    batch,
    loss_of,
    through_stages,
)

WAYS: dict[str, dict[str, int]] = {
    "one process": {},
    "DDP": {"dp": 4},
    "ZeRO": {"dp": 4},
    "FSDP2": {"dp": 4},
    "FSDP1": {"dp": 4},
    "HSDP": {"replicate": 2, "shard": 2},
    "TP": {"dp": 1, "tp": 4},
    "sequence parallel": {"dp": 1, "tp": 4},
    "hand-written TP": {"dp": 1, "tp": 4},
    "hand-written TP x DDP": {"dp": 2, "tp": 2},
    "FSDP2 x TP": {"dp": 2, "tp": 2},
    "PP": {"pp": 4, "dp": 1},
    "PP x FSDP2": {"pp": 2, "dp": 2},
    "experts": {"dp": 4},
    "FSDP2 of 8": {"dp": 8},
    "HSDP of 8": {"replicate": 2, "shard": 4},
    "FSDP2 x TP of 8": {"dp": 4, "tp": 2},
    "HSDP x TP of 8": {"replicate": 2, "shard": 2, "tp": 2},
    "PP x FSDP2 x TP of 8": {"pp": 2, "dp": 2, "tp": 2},
}
"""Name -> the dimensions of its mesh."""
CUTS = {"blocks.*.up.*": 0, "blocks.*.down.weight": 1}


def ranks_of(way: str) -> int:
    return math.prod(WAYS[way].values())


class Job:
    """A training on its ranks. Made on all of them; what it begins with does not matter, for it is loaded over."""

    def __init__(self, way: str, *, seed: int) -> None:
        torch.manual_seed(seed)
        dims = WAYS[way] or {"dp": 1}
        self.way, self.mesh = way, init_device_mesh("cpu", (*dims.values(),), mesh_dim_names=(*dims,))
        self.stages, self.stage = dims.get("pp", 1), self._at("pp")
        tp, at = dims.get("tp", 1), self.mesh
        by_hand, dealt = way.startswith("hand-written"), way == "experts"
        experts = range(at["dp"].get_local_rank(), EXPERTS, at["dp"].size()) if dealt else range(EXPERTS)
        kind = {"sequence parallel": SequenceBlock, "experts": ExpertBlock}.get(way, PlainBlock if by_hand else Block)
        hidden = HIDDEN // tp if by_hand else HIDDEN
        self.net = Net(kind, experts=experts, hidden=hidden, stage=self.stage, stages=self.stages)
        for block in self.net.blocks.values():
            if by_hand or dealt:
                block.group = at["tp" if by_hand else "dp"].get_group()  # type: ignore[assignment]
            elif tp > 1:
                self._parallelize(block, at["tp"])
        self.module = self._wrapped(dims)
        self.optimizer = self._make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.9)
        self.progress: dict[str, Any] = {"step": 0, "losses": [], "best": None}

    def _at(self, dim: str) -> int:
        return self.mesh[dim].get_local_rank() if dim in (self.mesh.mesh_dim_names or ()) else 0

    def _parallelize(self, block: nn.Module, mesh: DeviceMesh) -> None:
        if not isinstance(block, SequenceBlock):
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            return
        block.mesh = mesh
        sharded = {"input_layouts": Shard(1)}, {"output_layouts": Shard(1), "use_local_output": False}
        plan = {"norm": SequenceParallel(), "up": ColwiseParallel(**sharded[0], use_local_output=False)}
        parallelize_module(block, mesh, {**plan, "down": RowwiseParallel(**sharded[1])})

    def _wrapped(self, dims: Mapping[str, int]) -> nn.Module:
        if self.way in ("DDP", "ZeRO") or self.way == "hand-written TP x DDP":
            return nn.parallel.DistributedDataParallel(self.net, process_group=self.mesh["dp"].get_group())
        if self.way == "FSDP1":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return FullyShardedDataParallel(
                    self.net,
                    device_id=torch.device("cpu"),
                    device_mesh=self.mesh,
                    use_orig_params=True,
                    auto_wrap_policy=ModuleWrapPolicy({Block}),
                )
        over = ("replicate", "shard") if "shard" in dims else ("dp",)
        if "FSDP2" in self.way or "HSDP" in self.way:
            for block in self.net.blocks.values():
                fully_shard(block, mesh=self.mesh[over])
            fully_shard(self.net, mesh=self.mesh[over])
        return self.net

    def _make_optimizer(self) -> torch.optim.Optimizer:
        plain = [p for name, p in self.module.named_parameters() if name.endswith("bias") or ".norm." in name]
        rest = [p for p in self.module.parameters() if not any(p is q for q in plain)]
        groups = [{"params": rest}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]
        options: dict[str, Any] = {"lr": 1e-2, "foreach": False}
        if self.way != "ZeRO":
            return torch.optim.AdamW(groups, **options)
        zero: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
        return zero

    def train_step(self) -> float:
        """A real step; gives the loss."""
        tokens = batch(self.progress["step"])
        self.optimizer.zero_grad()
        if self.stages > 1:
            group = self.mesh["pp"].get_group()
            loss = through_stages(self.module, tokens, group=group, stage=self.stage, stages=self.stages)
        else:
            (found := loss_of(self.module(tokens), tokens)).backward()
            loss = found.item()
        self.optimizer.step()
        self.scheduler.step()
        self.progress["step"] += 1
        self.progress["losses"] = [*self.progress["losses"], 0.5 * self.progress["step"]]
        return loss

    def state(self) -> dict[str, Any]:
        """What a program hands in: of FSDP1 what torch gives for it, of all others the live objects."""
        model, optimizer = self._halves()
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler, "progress": self.progress}

    def _halves(self) -> tuple[Any, Any]:
        if self.way == "FSDP1":
            return get_state_dict(self.module, self.optimizer)
        if self.way.startswith("hand-written"):
            return sc.TensorSplit(self.module, CUTS), self.optimizer
        if self.way == "experts":
            return sc.TensorSplit(self.module, {"*.experts.*": "own"}), self.optimizer
        return self.module, self.optimizer

    def policy(self) -> sc.LoadPolicy | None:
        """Groups that are plain values do not go by name: of pipeline stages they would be those of one stage."""
        return sc.LoadPolicy(exclude=["optimizer.param_groups.*.params"]) if self.way == "FSDP1" else None

    def loaded(self, state: Mapping[str, Any]) -> None:
        """After a load into this state."""
        if self.way == "FSDP1":
            set_state_dict(
                self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )

    def held(self) -> dict[str, Any]:
        """Everything that this rank has: whole tensors, but for parts that were cut by hand. Called by all ranks."""
        if self.way == "FSDP1":
            model, optimizer = self._halves()
            found = {name: full(value) for name, value in model.items()}
            moments = dict(optimizer["state"])
            rates = {name: group["lr"] for group in optimizer["param_groups"] for name in group["params"]}
        else:
            found = {name: full(value) for name, value in self.net.state_dict().items()}
            state = getattr(self.optimizer, "optim", self.optimizer).state
            names = {id(p): name for name, p in self.net.named_parameters()}
            moments = {names[id(p)]: values for p, values in state.items()}
            rates = {names[id(p)]: group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        found |= {f"{name} {key}": full(value) for name, those in moments.items() for key, value in those.items()}
        found |= {f"{name} lr": rate for name, rate in rates.items()}
        return {**found, "scheduler": self.scheduler.state_dict(), "progress": dict(self.progress)}

    def part_of(self, name: str, whole: Any) -> Any:
        """What this rank has of it."""
        field, _, moment = name.partition(" ")
        if not self.way.startswith("hand-written") or moment in ("step", "lr"):
            return whole
        at = self.mesh["tp"].get_local_rank()
        if ".up." in field:
            return whole.chunk(self.mesh["tp"].size())[at]
        return whole.chunk(self.mesh["tp"].size(), 1)[at] if field.endswith("down.weight") else whole

    def wrong(self, reference: Mapping[str, Any]) -> Iterator[str]:
        """What is not what it was, bit for bit."""
        for name, found in self.held().items():
            expected = self.part_of(name, reference[name]) if name in reference else None
            if isinstance(found, torch.Tensor):
                alike = expected is not None and (found.dtype, found.shape) == (expected.dtype, expected.shape)
                if not alike or not torch.equal(as_bytes(found), as_bytes(expected)):
                    yield name
            elif found != expected:
                yield f"{name}: {found} != {expected}"
