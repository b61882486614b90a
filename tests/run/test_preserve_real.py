"""Real checkpoints of which only the model was kept: it loads wherever the whole one would, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import shardckpt as sc
from shardckpt.format.layout import MANIFEST
from shardckpt.format.manifest import encode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.run.deletion import preserve_model
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.gangs import run_ranks
from shardckpt.testing.pool import ProcessPool
from tests.distributed.jobs import Job, Layout, as_bytes, checkpoints, full, keep_reference
from tests.engine.states import train, training

STEP = 2


def preserve(storage: Storage) -> set[str]:
    """Gives the files that are left, without the folder of their attempt."""
    catalog = Catalog(storage)
    preserve_model(storage, catalog.entry(STEP))
    folder = catalog.entry(STEP).attempt_folder
    named = {file.name.rpartition("/")[2] for file in catalog.record(STEP)[1].files}
    assert named == {name for name in storage.list(folder) if name != MANIFEST}
    return named


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(as_bytes(tensor), as_bytes(other[name])), name


def test_the_model_of_one_process(storage: Storage) -> None:
    saved, other = training(0), training(1)
    train(saved, 2)
    with sc.CheckpointManager(storage) as manager:
        manager.save(STEP, saved, metadata={"loss": 2.5}).result()
    assert preserve(storage) == {"model.pt"}
    with sc.CheckpointManager(storage) as manager:
        with pytest.raises(sc.CheckpointMismatchError, match=r"only the model is there .* optimizer"):
            manager.load(STEP, other)
        info = manager.load(STEP, {"model": other["model"]})
    assert_same(other["model"].state_dict(), saved["model"].state_dict())
    assert info.metadata == {"loss": 2.5}


def test_a_model_under_another_key_is_found_if_the_key_is_said(storage: Storage) -> None:
    saved, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with sc.CheckpointManager(storage) as manager:
        manager.save(STEP, {"net": saved, "seen": 7}, model_key="net").result()
        preserve_model(storage, Catalog(storage).entry(STEP), model_key="net")
        manager.load(STEP, {"net": other})
    assert_same(other.state_dict(), saved.state_dict())
    assert Catalog(storage).record(STEP)[1].model_key == "net"


class Shard(torch.nn.Module):
    """What a model-parallel rank holds when nobody has told torch that it is a part; with a value of its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((5, 3), float(number)))
        self.number = number

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
@pytest.mark.parametrize(
    ("replicated", "left"),
    [
        (("model",), {"model.0.pt", "model.1.pt"}),
        ((), {"model.0.pt", "model.1.pt", *(f"rank_{rank}.pt" for rank in range(4))}),
    ],
    ids=["declared", "its value is in the files of the ranks"],
)
def test_the_shards_of_a_tensor_parallel_model(
    kind: type[MemoryObjects], replicated: tuple[str, ...], left: set[str]
) -> None:
    storage = kind("run")

    def save(gangs: sc.Gangs) -> None:
        model = Shard(gangs.tp.rank)
        state = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "mine": gangs.root.rank}
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.save(STEP, state, replicated=replicated).result()

    def load(gangs: sc.Gangs) -> tuple[float, int]:
        model = Shard(9)
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.load(STEP, {"model": model})
        return model.weight.mean().item(), model.number

    run_ranks(4, save, tp=2)
    assert preserve(storage) == left
    assert run_ranks(4, load, tp=2) == [(0.0, 0), (1.0, 1), (0.0, 0), (1.0, 1)]


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_a_consolidated_model_has_the_values_of_the_model_too(kind: type[MemoryObjects]) -> None:
    storage = kind("run")
    model = {"w": torch.randn(5, 3), "empty": torch.zeros(0, 3), "extra": {"scale": 0.5, "history": [1, 2]}}

    def save(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.save(STEP, {"model": model, "mine": gangs.root.rank}).result()

    def load(gangs: sc.Gangs) -> dict[str, Any]:
        state = {"model": {"w": torch.zeros(5, 3), "empty": torch.ones(0, 3), "extra": {"scale": 0, "history": [0, 0]}}}
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.load(STEP, state)
        return state["model"]

    run_ranks(2, save)
    add_consolidated(storage, MemoryStorage("aside"), model)
    assert preserve(storage) == {"model.pt"}
    for world_size in (1, 2, 3):
        for loaded in run_ranks(world_size, load):
            assert torch.equal(loaded["w"], model["w"])
            assert loaded["extra"] == model["extra"]


def save_and_preserve(rank: int, world_size: int, folder: Path, root: Path, layout: Layout, consolidate: bool) -> Any:
    """On all ranks of a job: two steps, a save, and on rank 0 the rest goes. The model, gathered, lies beside it."""
    job = Job(layout, seed=0)
    for _ in range(2):
        job.train_step()
    with checkpoints(root / "run", job.mesh) as manager:
        manager.save(STEP, job.state()).result()
    model = {name: full(value) for name, value in get_model_state_dict(job.module).items()}
    keep_reference(root / "reference.pt", model)
    if rank != 0:
        return None
    storage = LocalStorage(root / "run")
    if consolidate:
        add_consolidated(storage, LocalStorage(root / "aside"), model)
    return sorted(preserve(storage))


def add_consolidated(storage: Storage, aside: Storage, model: dict[str, Any]) -> None:
    """Put the file that one process would save of this model into the step of others."""
    with sc.CheckpointManager(aside, sc.Gangs.local()) as manager:
        manager.save(STEP, {"model": model}).result()
    (file,) = (file for file in Catalog(aside).record(STEP)[1].files if file.name == "model.pt")
    entry, record = Catalog(storage).entry(STEP), Catalog(storage).record(STEP)[1]
    storage.put(f"{entry.attempt_folder}/model.pt", [aside.read(f"step_{STEP}/model.pt")])
    name = f"{entry.attempt_folder}/model.pt".removeprefix(f"{entry.folder}/")
    record = replace(record, files=(*record.files, replace(file, name=name, kind="consolidated")))
    storage.replace(entry.record_key, encode_manifest(record))


def load_model(rank: int, world_size: int, folder: Path, root: Path, layouts: list[Layout]) -> None:
    """On each of these layouts, all of as many ranks."""
    for layout in layouts:
        job = Job(layout, seed=1)
        with checkpoints(root / "run", job.mesh) as manager:
            manager.load(STEP, {"model": job.module})
        loaded = {name: full(value) for name, value in get_model_state_dict(job.module).items()}
        assert_same(loaded, torch.load(root / "reference.pt"))
        job.train_step()


@pytest.mark.parametrize(("layout", "consolidate"), [(Layout(2, 2), True), (Layout(4, 1, "hsdp"), False)], ids=str)
@pytest.mark.sampled(2)
def test_a_sharded_model_loads_anywhere(ranks: ProcessPool, tmp_path: Path, layout: Layout, consolidate: bool) -> None:
    left = ranks.run(4, save_and_preserve, tmp_path, layout, consolidate)[0]
    if consolidate:
        assert left == ["model.pt"]
    else:
        assert {f"rank_{rank}.pt" for rank in range(4)} <= set(left)
    ranks.run(4, load_model, tmp_path, [layout, Layout(4), Layout(1, 4), Layout(4, 1, "ddp")])
    ranks.run(2, load_model, tmp_path, [Layout(2), Layout(1, 2)])
    ranks.run(1, load_model, tmp_path, [Layout(1)])
