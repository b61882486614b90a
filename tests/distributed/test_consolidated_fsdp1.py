"""The consolidated file of models under FSDP1: from the flat shards, on CPU too, and without the training's groups."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed.consolidation import assert_same, consolidate_and_read
from tests.distributed.jobs import WORDS, Block, Net

pytestmark = pytest.mark.filterwarnings("ignore")


def wrap(model: nn.Module, strategy: str = "FULL_SHARD", **options: Any) -> FullyShardedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=getattr(ShardingStrategy, strategy), **options
        )


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in model.state_dict().items()}


def train(model: nn.Module) -> None:
    """One step, on the same data on all ranks and in every wrapping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(0, WORDS, (4, 7), generator=torch.Generator().manual_seed(5))
    logits = model(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
    optimizer.step()


def gathered(model: FullyShardedDataParallel) -> dict[str, torch.Tensor]:
    """All parameters and buffers as FSDP itself puts them together, by plain name."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        return {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone() for name, tensor in found}


def write_nets(rank: int, world_size: int, folder: Path, strategy: str, use_orig_params: bool) -> None:
    """Tied words, buffers, a frozen parameter that FSDP ignores; of sizes that no number of ranks divides."""
    for trained in (False, True):
        torch.manual_seed(0)
        net = Net()
        expected = state_of(net)
        mesh = init_device_mesh("cpu", (2, 2)) if strategy.startswith("HYBRID") else None
        model = wrap(
            net,
            strategy,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=use_orig_params,
            ignored_states=[net.frozen],
            device_mesh=mesh,
        )
        if trained:
            train(model)
            expected = gathered(model)
        found = consolidate_and_read(folder / str(trained), model)
        assert_same(found, expected)
        assert found["head.weight"].data_ptr() == found["words.weight"].data_ptr()


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [("FULL_SHARD", 4), ("FULL_SHARD", 1), ("SHARD_GRAD_OP", 3), ("NO_SHARD", 2), ("HYBRID_SHARD", 4)],
)
def test_every_strategy(ranks, strategy, world_size, use_orig_params):
    ranks.run(world_size, write_nets, strategy, use_orig_params)


class Counting(nn.Module):
    """A module with extra state, a persistent and a passing buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(0, 1, 5))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.scale = nn.Parameter(torch.randn(1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": 3, "history": torch.arange(4.0)}

    def set_extra_state(self, state: Any) -> None: ...


class Odd(nn.Module):
    """Parameters of every dimension, some not laid out row by row, one empty, one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(7, 11).t())
        self.channels_last = nn.Conv2d(5, 3, 3)
        self.channels_last.weight.data = self.channels_last.weight.data.to(memory_format=torch.channels_last)
        self.volume = nn.Conv3d(2, 3, (2, 3, 2))
        self.single = nn.Parameter(torch.randn(1, 1, 1))
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.counting = Counting()
        self.checkpointed = checkpoint_wrapper(nn.Linear(13, 4))
        self.ignored = nn.Linear(3, 3)


def write_odd(rank: int, world_size: int, folder: Path, use_orig_params: bool, nested: bool) -> None:
    torch.manual_seed(1)
    odd = Odd()
    expected = state_of(odd)
    policy = ModuleWrapPolicy({nn.Linear, nn.Conv3d, Counting}) if nested else None
    model = wrap(
        odd, auto_wrap_policy=policy, use_orig_params=use_orig_params, ignored_states=list(odd.ignored.parameters())
    )
    found = consolidate_and_read(folder, torch.compile(model) if nested else model)
    extra = found.pop("counting._extra_state")
    assert extra["calls"] == 3
    assert extra["history"].tolist() == [0.0, 1.0, 2.0, 3.0]
    expected.pop("counting._extra_state")
    assert_same(found, expected)
    assert found["again.weight"].data_ptr() == found["twice.weight"].data_ptr()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("world_size", [3, 4])
def test_odd_parameters(ranks, world_size, nested, use_orig_params):
    ranks.run(world_size, write_odd, use_orig_params, nested)


def write_with_tp(rank: int, world_size: int, folder: Path, use_orig_params: bool) -> None:
    """FSDP1 over "dp" of a model whose blocks are split over "tp": the flat parameters hold parts of DTensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(2)
    net = Net()
    expected = state_of(net)
    for block in net.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    options = {"use_orig_params": use_orig_params, "ignored_states": [net.frozen], "device_mesh": mesh["dp"]}
    model = wrap(net, auto_wrap_policy=ModuleWrapPolicy({Block}), **options)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert_same(consolidate_and_read(folder, model), expected)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_with_tensor_parallelism(ranks, use_orig_params):
    ranks.run(4, write_with_tp, use_orig_params)


def write_mixed(rank: int, world_size: int, folder: Path) -> None:
    """Buffers that FSDP has cast come out in their own dtype; parameters in full precision, also after a forward."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7).eval())
    expected = state_of(model)
    mixed = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    wrapped = wrap(model, mixed_precision=mixed, use_orig_params=True)
    with torch.no_grad():
        wrapped(torch.ones(2, 4))
    assert model[1].running_mean.dtype == torch.bfloat16
    assert_same(consolidate_and_read(folder, wrapped), expected)


def test_mixed_precision(ranks):
    ranks.run(2, write_mixed)


def write_replaced(rank: int, world_size: int, folder: Path) -> None:
    """Memory that was given to an original parameter, as averaging does, is what counts, before FSDP takes it over."""
    model = wrap(nn.Linear(5, 3), use_orig_params=True)
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, 2.5)
    found = consolidate_and_read(folder, model)
    assert all((value == 2.5).all() for value in found.values())
    assert_same(found, gathered(model))


def test_replaced_parameters(ranks):
    ranks.run(2, write_replaced)
