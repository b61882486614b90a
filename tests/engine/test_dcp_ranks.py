"""`DcpWriter` and `DcpReader` on several processes: any mesh in and out; one fails, all know, nothing is committed."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import shardckpt as sc
from shardckpt.storage import LocalStorage
from shardckpt.testing.faults import CountingStorage, FailingStorage, on
from shardckpt.testing.pool import ProcessPool

pytestmark = [
    pytest.mark.xdist_group("dcp_ranks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning"),
]


class Block(nn.Module):
    """Sizes that do not divide evenly, a plain parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 20)
        self.down = nn.Linear(20, 7, bias=False)
        self.scale = nn.Parameter(torch.ones(7))
        self.seen = nn.Buffer(torch.zeros(3, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """A model of that kind on all ranks; the third is its tensor-parallel degree."""
    torch.manual_seed(seed)
    model, world = Block(), dist.get_world_size() if dist.is_initialized() else 1
    model.seen.add_(seed)
    tp = {"tp": world, "2d": 2}.get(kind, 1)
    if kind in ("tp", "2d"):
        mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "2d":
            fully_shard(model, mesh=mesh["dp"])
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), tp


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(11)  # the same batch on all ranks: replicated parameters stay alike
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def full(tree: Any) -> Any:
    """Everything, whole, as plain tensors: the reference to compare with."""
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full(value) for value in tree]
    if isinstance(tree, DTensor):
        return tree.full_tensor().clone()
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict):
        return [d for key in one | other for d in differences(one.get(key), other.get(key), f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{path}: {one} != {other}"]
    return [] if one == other else [f"{path}: {one} != {other}"]


SAVE: dict[str, Callable[[dict[str, Any], sc.DcpWriter], object]] = {
    "sync": lambda state, writer: dcp.save(state, storage_writer=writer),
    "async": lambda state, writer: dcp.async_save(state, storage_writer=writer).result(timeout=50),
}


def save_model(rank: int, world: int, folder: Path, kind: str, root: Path, how: str = "sync") -> Any:
    model, optimizer, tp = build(kind, 3)
    train(model, optimizer)
    if how == "manager":
        with sc.CheckpointManager(root, sc.Gangs.from_env(tp=tp)) as checkpoints:
            checkpoints.save(1, {"model": model, "optimizer": optimizer, "who": rank}).result()
    else:
        SAVE[how]({**state_of(model, optimizer), "who": rank}, sc.DcpWriter(root / "step_1"))
    return full(state_of(model, optimizer))


def load_model(rank: int, world: int, folder: Path, kind: str, root: Path, expected: Any, how: str = "dcp") -> int:
    """Load into a fresh model of this kind, and compare everything; gives the bytes read."""
    model, optimizer, tp = build(kind, 4)
    storage = CountingStorage(LocalStorage(root))
    if how == "manager":
        with sc.CheckpointManager(storage, sc.Gangs.from_env(tp=tp)) as checkpoints:
            policy = sc.LoadPolicy(unexpected="ignore")
            checkpoints.load(1, {"model": model, "optimizer": optimizer}, policy=policy)
    else:
        state = state_of(model, optimizer)
        dcp.load(state, storage_reader=sc.DcpReader("step_1", storage=storage))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert differences(expected, full(state_of(model, optimizer))) == []
    return storage.total_nbytes


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("tp", 2), ("ddp", 2), ("2d", 4)])
@pytest.mark.sampled(2)
def test_saved_on_one_mesh_loads_on_others_bit_for_bit(
    ranks: ProcessPool, tmp_path: Path, kind: str, world: int
) -> None:
    expected = ranks.run(world, save_model, kind, tmp_path)[0]
    for file in (tmp_path / "step_1").glob("*.pt"):
        torch.load(file, mmap=True, weights_only=True)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
    for other, size in [("ddp", 1), ("fsdp", 2), ("tp", 2), ("2d", 4), ("fsdp", 4)]:
        ranks.run(size, load_model, other, tmp_path, expected)
    for other, size in [("ddp", 1), ("fsdp", 2), ("2d", 4)]:
        ranks.run(size, load_model, other, tmp_path, expected, "manager")


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("2d", 4)])
def test_what_managers_saved_dcp_loads(ranks: ProcessPool, tmp_path: Path, kind: str, world: int) -> None:
    expected = ranks.run(world, save_model, kind, tmp_path, "manager")[0]
    for other, size in [("ddp", 1), ("fsdp", 2), ("tp", 2), ("fsdp", 4)]:
        ranks.run(size, load_model, other, tmp_path, expected)


def test_async_saves_are_checkpoints_too(ranks: ProcessPool, tmp_path: Path) -> None:
    expected = ranks.run(2, save_model, "fsdp", tmp_path, "async")[0]
    ranks.run(1, load_model, "ddp", tmp_path, expected)


def save_per_rank(rank: int, world: int, folder: Path, root: Path) -> None:
    state = {
        "who": {"rank": rank, "world": world},
        "position": [rank * 10, "file"],
        "rng": torch.zeros(4),
        "list": [torch.full((2,), 5.0), {"mine": rank}, None],
    }
    dcp.save(state, storage_writer=sc.DcpWriter(root / "step_1"))


def load_per_rank(rank: int, world: int, folder: Path, root: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    state = {"who": {"rank": -1, "world": -1}, "position": [], "list": [torch.zeros(2), {"mine": -1}, 3]}
    state = {key: value for key, value in state.items() if key in keys}
    dcp.load(state, storage_reader=sc.DcpReader(root / "step_1"))
    return state


def test_values_that_differ_stay_with_their_rank(ranks: ProcessPool, tmp_path: Path) -> None:
    """DCP's own writer keeps one of them, and gives it to all."""
    ranks.run(3, save_per_rank, tmp_path)
    assert json.loads((tmp_path / "step_1" / "manifest.json").read_bytes())["differ"] == [
        "list.1.mine",
        "position",
        "who.rank",
    ]
    for rank, loaded in enumerate(ranks.run(3, load_per_rank, tmp_path, ("who", "position", "list"))):
        assert loaded["who"] == {"rank": rank, "world": 3}
        assert loaded["position"] == [rank * 10, "file"]
        assert loaded["list"][0].tolist() == [5, 5]
        assert loaded["list"][1:] == [{"mine": rank}, None]
    outcomes = ranks.run_settled(2, load_per_rank, tmp_path, ("who",))
    for outcome in outcomes:
        assert isinstance(outcome.error, CheckpointException)
        assert "who.rank was saved with a different value by each of 3 ranks, and this job has 2" in str(outcome.error)


def test_each_file_is_complete_in_what_its_rank_holds(ranks: ProcessPool, tmp_path: Path) -> None:
    ranks.run(2, save_per_rank, tmp_path)
    trees = [torch.load(tmp_path / "step_1" / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert [tree["who"]["rank"] for tree in trees] == [0, 1]
    places = [tree["list"][0] for tree in trees]
    assert sorted(place is None for place in places) == [False, True], "one has the tensor, the other its place"
    assert [tree["list"][1]["mine"] for tree in trees] == [0, 1]


class Meter:
    """Something with `state_dict` that takes what it gets: it must get all of it."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.content = state


def meters(rank: int) -> dict[str, Any]:
    """Tensors of many sizes, which DCP gives to one rank or the other, beside values of each rank's own."""
    content: dict[str, Any] = {f"t{size}": torch.full((size,), float(size)) for size in (1, 2, 30, 4, 50, 6)}
    return {**content, "rank": rank, "none": None if rank else 5, "rows": [torch.ones(2), {"r": rank}, torch.ones(9)]}


def save_meter(rank: int, world: int, folder: Path, root: Path) -> None:
    dcp.save({"meter": Meter(meters(rank))}, storage_writer=sc.DcpWriter(root / "step_1"))


def load_meter(rank: int, world: int, folder: Path, root: Path, rule: str) -> Any:
    meter = Meter({})
    with sc.CheckpointManager(root, sc.Gangs.from_env()) as checkpoints:
        checkpoints.load(1, {"meter": meter}, policy=sc.LoadPolicy(new_world={"meter": rule}))
    return meter.content


def test_an_object_gets_all_of_its_state_wherever_dcp_put_it(ranks: ProcessPool, tmp_path: Path) -> None:
    ranks.run(2, save_meter, tmp_path)
    trees = [torch.load(tmp_path / "step_1" / f"rank_{rank}.pt", weights_only=True)["meter"] for rank in range(2)]
    assert all(0 < sum(key.startswith("t") for key in tree) < 6 for tree in trees), "some here, some there"
    for rank, loaded in enumerate(ranks.run(2, load_meter, tmp_path, "fail")):
        assert differences(meters(rank), loaded) == []
    assert differences(meters(0), ranks.run(1, load_meter, tmp_path, "first")[0]) == []


def save_differing(rank: int, world: int, folder: Path, root: Path, **options: Any) -> None:
    state = {"alike": torch.ones(3), "rng": torch.full((4,), rank), "sizes": torch.ones(rank + 1)}
    dcp.save(state, storage_writer=sc.DcpWriter(root / "step_1", **options))


def test_tensors_that_differ_are_not_dropped_in_silence(ranks: ProcessPool, tmp_path: Path) -> None:
    outcomes = ranks.run_settled(2, save_differing, tmp_path)
    for outcome in outcomes:
        assert "rng (for example ranks 0 and 1); sizes (for example ranks 0 and 1)" in str(outcome.error)
        assert "unsharded='any'" in str(outcome.error)
    assert os.listdir(tmp_path) == []
    ranks.run(2, partial(save_differing, unsharded="any"), tmp_path)
    assert os.listdir(tmp_path) == ["step_1"]


def save_failing(rank: int, world: int, folder: Path, root: Path, failing: int, how: str) -> list[str]:
    """One rank's disk is full the first time; gives what all saw of it."""
    broken = FailingStorage(LocalStorage(root), on("put", key=f"rank_{failing}"), error=lambda: OSError(28, "full"))
    writer = sc.DcpWriter("step_2", storage=broken)
    state = {"x": distribute_tensor(torch.arange(10.0), init_device_mesh("cpu", (world,)), [Shard(0)]), "who": rank}
    with pytest.raises(CheckpointException) as caught:
        SAVE[how](state, writer)
    (cause,) = (failure[0] for failure in caught.value.failures.values())
    assert isinstance(cause, sc.CheckpointSaveError), cause
    assert f"rank {failing}: OSError: [Errno 28] full" in str(cause)
    dist.barrier()
    seen = sorted(os.listdir(root))
    dist.barrier()
    dcp.save(state, storage_writer=writer)
    target = {"x": distribute_tensor(torch.zeros(10), init_device_mesh("cpu", (world,)), [Shard(0)]), "who": -1}
    dcp.load(target, storage_reader=sc.DcpReader(root / "step_2"))
    assert torch.equal(target["x"].to_local(), state["x"].to_local())
    assert target["who"] == rank
    return seen


@pytest.mark.parametrize(("failing", "how"), [(0, "sync"), (2, "sync"), (1, "async")])
def test_one_fails_all_know_and_the_old_step_stays(ranks: ProcessPool, tmp_path: Path, failing: int, how: str) -> None:
    dcp.save({"old": torch.ones(1)}, storage_writer=sc.DcpWriter(tmp_path / "step_2"))
    for seen in ranks.run(3, save_failing, tmp_path, failing, how):
        assert seen == ["step_2"], "the old one, and nothing else"


def save_and_load_any(rank: int, world: int, folder: Path, root: Path) -> None:
    """Shapes that divide badly, empty shares, replicas, submeshes' own tensors, tensors of no dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cases = {
        "rows": ((5, 3), [Shard(0), Replicate()]),
        "columns": ((3, 5), [Replicate(), Shard(1)]),
        "both": ((7, 5), [Shard(0), Shard(1)]),
        "short": ((1, 4), [Shard(0), Shard(0)]),
        "thin": ((3,), [Shard(0), Shard(0)]),
        "alike": ((6,), [Replicate(), Replicate()]),
        "none": ((0, 4), [Shard(0), Shard(1)]),
    }
    torch.manual_seed(5)
    whole = {name: torch.randn(shape) for name, (shape, _) in cases.items()}
    state: dict[str, Any] = {n: distribute_tensor(t, mesh, cases[n][1]) for n, t in whole.items()}
    state["scalar"] = torch.tensor(4)
    dcp.save(state, storage_writer=sc.DcpWriter(root / "step_1"))
    swapped: dict[str, Any] = {
        n: distribute_tensor(torch.zeros_like(t), mesh, cases[n][1][::-1]) for n, t in whole.items()
    }
    swapped["scalar"] = torch.tensor(0)
    dcp.load(swapped, storage_reader=sc.DcpReader(root / "step_1"))
    assert differences({**whole, "scalar": torch.tensor(4)}, full(swapped)) == []
    plain = {n: torch.zeros_like(t) for n, t in whole.items()}
    dcp.load(plain, storage_reader=sc.DcpReader(root / "step_1"))
    assert differences(whole, plain) == []


def test_odd_placements(ranks: ProcessPool, tmp_path: Path) -> None:
    ranks.run(4, save_and_load_any, tmp_path)


def load_interleaved(rank: int, world: int, folder: Path, root: Path) -> None:
    """Rank 0 holds rows 0, 1, 4, 5; DCP takes them for rows 0 to 3."""
    mesh = init_device_mesh("cpu", (2,))
    placement = _StridedShard(0, split_factor=2)
    target = DTensor.from_local(torch.zeros(4, 3), mesh, [placement], shape=torch.Size((8, 3)), stride=(3, 1))
    with pytest.raises(CheckpointException, match=r"w: DCP does not understand its placement \['SS\(0,2\)'\]"):
        dcp.load({"w": target}, storage_reader=sc.DcpReader(root / "step_1"))
    assert not target.to_local().any()


def test_a_placement_that_dcp_misreads_is_refused(ranks: ProcessPool, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(8, 3)}, storage_writer=sc.DcpWriter(tmp_path / "step_1"))
    ranks.run(2, load_interleaved, tmp_path)


def save_pipeline(rank: int, world: int, folder: Path, root: Path) -> None:
    """Ranks with keys of their own, as pipeline stages have."""
    state = {f"stage{rank}": {"w": torch.full((3,), float(rank)), "depth": rank}, "shared": torch.ones(2)}
    dcp.save(state, storage_writer=sc.DcpWriter(root / "step_1"))


def test_ranks_with_keys_of_their_own(ranks: ProcessPool, tmp_path: Path) -> None:
    ranks.run(2, save_pipeline, tmp_path)
    state = {f"stage{rank}": {"w": torch.zeros(3), "depth": -1} for rank in range(2)}
    dcp.load(state, storage_reader=sc.DcpReader(tmp_path / "step_1"))
    assert [state[f"stage{rank}"]["w"].tolist() for rank in range(2)] == [[0.0] * 3, [1.0] * 3]
    assert [state[f"stage{rank}"]["depth"] for rank in range(2)] == [0, 1]
    with sc.CheckpointManager(tmp_path) as checkpoints:
        mine = {"stage1": {"w": torch.zeros(3), "depth": -1}, "shared": torch.zeros(2)}
        checkpoints.load(1, mine, policy=sc.LoadPolicy(unexpected="ignore"))
    assert mine["stage1"]["w"].tolist() == [1.0] * 3


def load_damaged(rank: int, world: int, folder: Path, root: Path) -> None:
    """Every rank hears which rank found damage, and its own state is as it was where it did."""
    target = {"x": distribute_tensor(torch.zeros(10), init_device_mesh("cpu", (world,)), [Shard(0)])}
    with pytest.raises(CheckpointException, match=r"rank_1\.pt") as caught:
        dcp.load(target, storage_reader=sc.DcpReader(root / "step_1"))
    failures = caught.value.failures
    assert {failed: type(pair[0]) for failed, pair in failures.items()} == {1: sc.CheckpointDamagedError}
    assert rank != 1 or not target["x"].to_local().any()


def save_sharded(rank: int, world: int, folder: Path, root: Path) -> None:
    state = {"x": distribute_tensor(torch.arange(1.0, 11.0), init_device_mesh("cpu", (world,)), [Shard(0)])}
    dcp.save(state, storage_writer=sc.DcpWriter(root / "step_1"))


def test_damage_that_one_rank_finds_is_an_error_on_all(ranks: ProcessPool, tmp_path: Path) -> None:
    ranks.run(2, save_sharded, tmp_path)
    file = tmp_path / "step_1" / "rank_1.pt"
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(6.0, 11.0).numpy().tobytes()) + 3] ^= 0xFF
    file.write_bytes(content)
    ranks.run(2, load_damaged, tmp_path)


def load_eighth(rank: int, world: int, folder: Path, root: Path) -> int:
    mesh = init_device_mesh("cpu", (world,))
    storage = CountingStorage(LocalStorage(root))
    target = distribute_tensor(torch.zeros(2048, 256), mesh, [Shard(1)])
    dcp.load({"w": target}, storage_reader=sc.DcpReader("step_1", storage=storage))
    torch.manual_seed(0)
    assert torch.equal(target.full_tensor(), torch.randn(2048, 256))
    return storage.total_nbytes - target.to_local().nbytes


def test_each_rank_reads_little_more_than_it_needs(ranks: ProcessPool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dcp.save({"w": torch.randn(2048, 256)}, storage_writer=sc.DcpWriter(tmp_path / "step_1"))
    for excess in ranks.run(4, load_eighth, tmp_path):
        assert excess < 1 << 20
