"""What PyTorch's own tests of `torch.distributed.checkpoint` do, told again for any writer and reader.

Their files are under `test/distributed/checkpoint` of the PyTorch repository; each function names the one that it is
after. Here they run over gloo on the CPU. Each runs on all ranks, in folders that are one job's, with a way to make
writers and readers, and asserts by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import (
    ChunkShardingSpec,
    EnumerableShardingSpec,
    ShardingSpec,
    ShardMetadata,
)
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt as sc

T = TypeVar("T")


class Way:
    """Saves into a folder and loads from it, by one pair of writer and reader."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind = kind
        self.root = root

    def writer(self, name: str = "c") -> Any:
        place = self.root / f"{name}_{self.kind}"
        return sc.DcpWriter(place) if self.kind == "ours" else dcp.FileSystemWriter(place, thread_count=2)

    def reader(self, name: str = "c") -> Any:
        """Always ours: it reads what either wrote."""
        return sc.DcpReader(self.root / f"{name}_{self.kind}")

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """All of them for our writer; of torch's, whose files are read chunk by chunk whatever they hold, the last."""
        return cases if self.kind == "ours" else cases[-1:]

    def save(self, state: dict[str, Any], name: str = "c", **options: Any) -> None:
        dcp.save(state, storage_writer=self.writer(name), **options)

    def load(self, state: dict[str, Any], name: str = "c", **options: Any) -> None:
        dcp.load(state, storage_reader=self.reader(name), **options)


def whole(tensor: Any) -> torch.Tensor:
    """On all ranks, whatever it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, ShardedTensor):
        out = torch.zeros(tensor.shape) if dist.get_rank() == 0 else None
        tensor.gather(out=out)
        gathered = [out]
        dist.broadcast_object_list(gathered)
        assert gathered[0] is not None
        return gathered[0]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert list(one) == list(other)
    return all(torch.equal(whole(a), whole(other[key])) for key, a in one.items())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 1)
        self.bag = nn.EmbeddingBag(5, 10)


class Mlp(nn.Module):
    """Even: every size is divided by four; uneven: none is. The same on all ranks."""

    def __init__(self, even: bool = True, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        a, b, c = (8, 4, 12) if even else (10, 15, 30)
        self.net1, self.net2, self.net3 = nn.Linear(5, a), nn.Linear(a, b), nn.Linear(b, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net3(torch.relu(self.net2(torch.relu(self.net1(x)))))
        return y


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(5)
    model(torch.rand(4, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def specs(rows: int, columns: int | None) -> list[ShardingSpec]:
    """Halves; quarters here and there; pieces of many sizes; two of different size."""

    def pieces(*sizes: tuple[int, int]) -> EnumerableShardingSpec:
        shards, at = [], 0
        for length, rank in sizes:
            rest = [] if columns is None else [columns]
            offsets = [at] if columns is None else [at, 0]
            shards.append(ShardMetadata(offsets, [length, *rest], placement=f"rank:{rank}/cpu"))
            at += length
        assert at == rows
        return EnumerableShardingSpec(shards=shards)

    return [
        ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"]),
        ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu", "rank:1/cpu", "rank:0/cpu"]),
        pieces((2, 0), (1, 1), (3, 0), (3, 1), (rows - 9, 0)),
        pieces((8, 1), (rows - 8, 0)),
    ]


def only_tensors(way: Way) -> None:
    """test_file_system_checkpoint_cpu.py, test_read_write_only_tensor: one process by itself."""
    saved, loaded = Plain().state_dict(), Plain().state_dict()
    own = Way(way.kind, way.root / str(dist.get_rank()))
    own.save(saved, no_dist=True)
    assert not alike(saved, loaded)
    own.load(loaded, no_dist=True)
    assert alike(saved, loaded)


def sharded_tensors(way: Way) -> None:
    """test_file_system_checkpoint_cpu.py, test_read_write_shard_tensor."""
    spec = specs(10, 20)[0]
    saved = {"w": sharded_tensor.rand(spec, 10, 20), "b": torch.arange(3.0)}
    loaded = {"w": sharded_tensor.rand(spec, 10, 20), "b": torch.zeros(3)}
    way.save(saved)
    assert not alike(saved, loaded)
    way.load(loaded)
    assert alike(saved, loaded)


def another_shard_plan(way: Way) -> None:
    """The same file, test_load_with_different_shard_plan, and test_load_rowwise_to_colwise."""
    plans = specs(10, 20)
    columns = ChunkShardingSpec(dim=1, placements=["rank:0/cpu", "rank:1/cpu"])
    for number, plan in enumerate(plans):
        saved = {"w": sharded_tensor.rand(plan, 10, 20)}
        way.save(saved, f"plan{number}")
        for other in way.some([*plans, columns]):
            loaded = {"w": sharded_tensor.zeros(other, 10, 20)}
            way.load(loaded, f"plan{number}")
            assert alike(saved, loaded), (plan, other)


def values(way: Way) -> None:
    """The same file, test_save_load_bytes."""
    way.save({"bytes0": [1], "bytes1": "string"})
    loaded = {"bytes0": [2], "bytes1": "other"}
    way.load(loaded)
    assert loaded == {"bytes0": [1], "bytes1": "string"}


def sharded_becomes_plain_and_back(way: Way) -> None:
    """The same file, test_switch_between_sharded_tensor_to_tensor."""
    for number, spec in enumerate(specs(32, None)):
        plain = torch.arange(32.0)
        saved = {"sharded": sharded_tensor.rand(spec, 32), "plain": plain}
        way.save(saved, f"spec{number}")
        for other in way.some(specs(32, None)):
            loaded = {"sharded": torch.zeros(32), "plain": sharded_tensor.zeros(other, 32)}
            way.load(loaded, f"spec{number}")
            assert alike(saved, loaded), (spec, other)


def dtensors_change_their_places(way: Way) -> None:
    """test_dtensor_resharding.py, all of it: placements change, and the mesh, from one dimension to two and back."""
    full = torch.arange(16.0).view(4, 4)
    line, square = (4,), (2, 2)
    of_line = [[Shard(0)], [Replicate()]]
    of_square = [[a, b] for a in (Replicate(), Shard(0)) for b in (Replicate(), Shard(0))]
    layouts = [(line, p) for p in of_line] + [(square, p) for p in of_square]
    meshes = {shape: init_device_mesh("cpu", shape) for shape in (line, square)}
    for number, (shape, places) in enumerate(layouts):
        way.save({"d": distribute_tensor(full, meshes[shape], places)}, f"layout{number}")
        for other, others in way.some(layouts):
            loaded = {"d": zeros([4, 4], device_mesh=meshes[other], placements=others)}
            way.load(loaded, f"layout{number}")
            assert torch.equal(loaded["d"].full_tensor(), full), (shape, places, other, others)


class Extra(nn.Module):
    def __init__(self, scale: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.sharded = nn.Parameter(distribute_tensor(torch.arange(4.0) * scale, mesh, [Shard(0)]))
        self.alike = nn.Parameter(distribute_tensor(torch.arange(4.0, 8.0) * scale, mesh, [Replicate()]))
        self.extra: dict[str, Any] = {"number": scale, "tensor": torch.full((1,), float(scale))}

    def get_extra_state(self) -> dict[str, Any]:
        return self.extra

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


def modules_with_extra_state(way: Way) -> None:
    """test_dtensor_checkpoint.py, test_distributed_tensor_planner."""
    saved, loaded = Extra(1).state_dict(), Extra(10).state_dict()
    way.save(saved)
    way.load(loaded)
    assert torch.equal(whole(loaded["sharded"]), torch.arange(4.0))
    assert torch.equal(whole(loaded["alike"]), torch.arange(4.0, 8.0))
    assert loaded["_extra_state"] == {"number": 1, "tensor": torch.ones(1)}


def tensor_parallel(way: Way) -> None:
    """test_tp_checkpoint.py."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(Mlp(), mesh, {"net1": ColwiseParallel(), "net2": RowwiseParallel()})
    saved = copy.deepcopy(model.state_dict())
    way.save(saved)
    torch.manual_seed(0)
    model(torch.rand(4, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.25).step()
    loaded = model.state_dict()
    assert not alike(saved, loaded)
    way.load(loaded)
    assert alike(saved, loaded)


def fsdp1(even: bool = True, seed: int = 1, **options: Any) -> FullyShardedDataParallel:
    model = FullyShardedDataParallel(Mlp(even, seed), device_id=torch.device("cpu"), **options)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return model


def hybrid(even: bool) -> FullyShardedDataParallel:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    return fsdp1(even, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def hsdp(way: Way) -> None:
    """test_hsdp_checkpoint.py: into itself after a step, and into FSDP on a flat mesh; even and uneven sizes."""
    for even in way.some((True, False)):
        model = hybrid(even)
        saved = {"model": copy.deepcopy(model.state_dict())}
        way.save(saved, f"even{even}")
        step(model, torch.optim.Adam(model.parameters(), lr=0.1))
        assert not alike(saved["model"], model.state_dict())
        flat = fsdp1(even, seed=2, device_mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        for other in (model, flat):
            loaded = {"model": other.state_dict()}
            way.load(loaded, f"even{even}")
            other.load_state_dict(loaded["model"])
            assert alike(saved["model"], other.state_dict())


def fsdp_to_tp(way: Way) -> None:
    """test_fsdp_tp_checkpoint_conversion.py; sharded by FSDP1 (as ShardedTensors) and by FSDP2."""
    for number, model in enumerate((fsdp1(use_orig_params=True), fully_shard(Mlp()))):
        saved = model.state_dict()
        way.save(saved, f"fsdp{number}")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        split = parallelize_module(Mlp(seed=2), mesh, {"net1": ColwiseParallel(), "net2": RowwiseParallel()})
        loaded = split.state_dict()
        assert not alike(saved, loaded)
        way.load(loaded, f"fsdp{number}")
        split.load_state_dict(loaded)
        assert alike(saved, split.state_dict())


def optimizer_state(way: Way) -> None:
    """test_fsdp_optim_state.py: load_sharded_optimizer_state_dict, with a planner and without."""
    model = fsdp1()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer)
    states = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    way.save({"model": model.state_dict(), "optim": states})
    for planner in way.some((dcp.DefaultLoadPlanner(), None)):
        other = fsdp1(seed=2)
        fresh = torch.optim.Adam(other.parameters(), lr=0.1)
        loaded = {"model": other.state_dict()}
        way.load(loaded)
        other.load_state_dict(loaded["model"])
        found = load_sharded_optimizer_state_dict(
            model_state_dict=loaded["model"], optimizer_key="optim", storage_reader=way.reader(), planner=planner
        )
        fresh.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, fresh, found["optim"]))
        again = FullyShardedDataParallel.optim_state_dict(other, fresh)
        assert list(again["state"]) == list(states["state"])
        for name, of_one in states["state"].items():
            assert alike(of_one, again["state"][name])


def two_dimensional(swapped: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    shape, names = (2, dist.get_world_size() // 2), ("tp", "dp") if swapped else ("dp", "tp")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = parallelize_module(Mlp(seed=seed), mesh["tp"], {"net1": ColwiseParallel(), "net2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def fsdp_and_tp(way: Way) -> None:
    """test_2d_fsdp_dt_checkpoint.py: with its optimizer; into the same mesh and into one that lies otherwise.

    With FSDP2, as FSDP1 over tensor parallelism is gone from torch.
    """
    model, optimizer = two_dimensional(False, 1)
    step(model, optimizer)
    model_state, optimizer_states = get_state_dict(model, optimizer)
    way.save({"model": model_state, "optim": optimizer_states})
    for swapped in way.some((False, True)):
        other, fresh = two_dimensional(swapped, 2)
        loaded_model, loaded_optimizer = get_state_dict(other, fresh)
        way.load({"model": loaded_model, "optim": loaded_optimizer})
        set_state_dict(other, fresh, model_state_dict=loaded_model, optim_state_dict=loaded_optimizer)
        again_model, again_optimizer = get_state_dict(other, fresh)
        assert alike(model_state, again_model)
        for name, of_one in optimizer_states["state"].items():
            assert alike(of_one, again_optimizer["state"][name])


class Tuned(nn.Module):
    """A model that was trained before, frozen, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrain = Mlp(seed=2)
        self.pretrain.requires_grad_(False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.relu(self.pretrain(x)))
        return y


def fine_tuning(way: Way) -> None:
    """e2e/test_fine_tuning.py: the submodule from one checkpoint, the rest, without what is frozen, from another."""
    model = fully_shard(Mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step(model, optimizer)
    pretrained, states = get_state_dict(model, optimizer)
    way.save({"model": pretrained, "optim": states}, "pretrain")
    trained: dict[str, Any] = {}
    for round_ in range(2):
        tuned = Tuned()
        fully_shard(tuned)
        tuning = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
        bare = StateDictOptions(keep_submodule_prefixes=False)
        below = get_model_state_dict(tuned, submodules={tuned.pretrain}, options=bare)
        way.load({"model": below}, "pretrain")
        prefixed = {f"pretrain.{name}": tensor for name, tensor in below.items()}
        set_model_state_dict(tuned, prefixed, options=StateDictOptions(strict=False))
        options = StateDictOptions(ignore_frozen_params=True)
        own, own_states = get_state_dict(tuned, tuning, options=options)
        assert set(own) == {"head.weight", "head.bias"}
        if round_:
            way.load({"model": own, "optim": own_states}, "tuned")
            assert alike(trained, own)
            loose = StateDictOptions(strict=False, ignore_frozen_params=True)
            set_state_dict(tuned, tuning, model_state_dict=own, optim_state_dict=own_states, options=loose)
        step(tuned, tuning)
        own, own_states = get_state_dict(tuned, tuning, options=options)
        if not round_:
            way.save({"model": own, "optim": own_states}, "tuned")
            trained = {name: tensor.detach().clone() for name, tensor in own.items()}
        assert alike(dict(pretrained), dict(tuned.pretrain.state_dict()))


def pipeline_stages(way: Way) -> None:
    """e2e/test_pipeline.py: each rank holds the keys of its stage only; and e2e/test_fsdp_ep.py, in this respect."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stages = {f"stage{number}": Mlp(seed=number + 1).state_dict() for number in range(world)}
    way.save({"model": {f"stage{rank}": stages[f"stage{rank}"]}})
    own = {"model": {f"stage{rank}": Mlp(seed=9).state_dict()}}
    way.load(own)
    assert alike(stages[f"stage{rank}"], own["model"][f"stage{rank}"])
    every = {"model": {name: Mlp(seed=9).state_dict() for name in stages}}
    way.load(every)
    assert all(alike(stages[name], every["model"][name]) for name in stages)


class Stateful:
    def __init__(self, value: float) -> None:
        self.content: dict[str, Any] = {"data": torch.full((3,), value)}

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state


def keys_in_another_order(way: Way) -> None:
    """e2e/test_e2e_save_and_load.py, test_different_ordered_state_dict_keys, test_overwrite, and Stateful objects."""
    names = ["a", "b", "c"] if dist.get_rank() == 0 else ["c", "a", "b"]
    for value in (1.0, 2.0):  # over the one before
        way.save({name: Stateful(value) for name in names})
        loaded = {name: Stateful(0.0) for name in reversed(names)}
        way.load(loaded)
        assert all(torch.equal(found.content["data"], torch.full((3,), value)) for found in loaded.values())
    partial: dict[str, Any] = {"b": {"data": torch.zeros(3)}}
    way.load(partial)
    assert partial["b"]["data"].tolist() == [2, 2, 2]


Scenario = Callable[[Way], None]
EVERY: dict[str, tuple[int, Scenario]] = {
    "only tensors": (2, only_tensors),
    "sharded tensors": (2, sharded_tensors),
    "another shard plan": (2, another_shard_plan),
    "values": (2, values),
    "sharded becomes plain": (2, sharded_becomes_plain_and_back),
    "dtensors": (4, dtensors_change_their_places),
    "extra state": (2, modules_with_extra_state),
    "tensor parallel": (2, tensor_parallel),
    "hsdp": (4, hsdp),
    "fsdp to tp": (2, fsdp_to_tp),
    "optimizer state": (2, optimizer_state),
    "fsdp and tp": (4, fsdp_and_tp),
    "fine-tuning": (2, fine_tuning),
    "pipeline stages": (2, pipeline_stages),
    "another order": (2, keys_in_another_order),
}
"""By name: ranks, and what they do."""
