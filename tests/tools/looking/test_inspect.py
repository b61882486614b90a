"""Inspect: what it says of a step is what torch finds in the files; it reads no tensor; trees add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import CountingStorage, flip_byte
from shardckpt.tools.looking.inspect import inspect, modules
from tests.engine.states import train, training
from tests.manager.transactions import Size
from tests.tools.making import save, save_on


def test_what_it_says_is_what_is_there(tmp_path: Path) -> None:
    state = training()
    train(state, 1)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(7, state, metadata={"note": "x"}).result()
    found = inspect(tmp_path)
    assert (found.step, found.world_size, found.metadata, found.url) == (7, 1, {"note": "x"}, f"{tmp_path}/step_7")
    lines = {line.name: line for line in found.tensors}
    for name, tensor in state["model"].state_dict().items():
        line = lines[f"model.{name}"]
        assert (line.dtype, line.shape, line.nbytes) == (str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes)
        assert (line.placement, line.home, line.ranks) == ("-", "model", 1)
    assert lines["model.head.weight"].tied_to == "model.embed.weight"
    assert lines["optimizer.state.body.weight.exp_avg"].shape == (300, 300)
    assert "progress.step" in found.values
    model, rank = found.files
    assert (model.name, model.kind, model.writer) == ("model.pt", "model", 0)
    assert model.nbytes == (tmp_path / "step_7/model.pt").stat().st_size
    tensors = [line for line in found.tensors if line.home == "model" and line.tied_to is None]
    assert model.tensor_nbytes == sum(line.nbytes for line in tensors)
    assert rank.tensor_nbytes is not None
    assert found.tensor_nbytes == model.tensor_nbytes + rank.tensor_nbytes
    assert [(line.rank, line.files, line.nbytes) for line in found.ranks] == [(0, 2, found.nbytes)]


def test_a_filter_and_a_tree(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, training()).result()
    found = inspect(f"{tmp_path}/step_1", only=["model", "progress.*"])
    assert {line.name.split(".")[0] for line in found.tensors} == {"model", "progress"}
    assert {name.split(".")[0] for name in found.values} == {"progress"}
    tree = modules(found.tensors)
    assert tree[0].name == "model"
    assert {line.name for line in tree if line.depth == 1} >= {"model.embed", "model.norm", "model.body", "model.head"}
    for line in tree:
        below = [inner for inner in tree if inner.name.rpartition(".")[0] == line.name]
        if below:
            assert (line.nbytes, line.tensors) == (sum(b.nbytes for b in below), sum(b.tensors for b in below))
    assert next(line for line in tree if line.name == "model.head").nbytes == 0  # tied
    assert modules(found.tensors, depth=0) == [line for line in tree if line.depth == 0]
    assert sum(line.nbytes for line in tree if line.depth == 0) == found.tensor_nbytes


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_no_tensor_is_read(kind: Any) -> None:
    storage = kind("run")
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.zeros(100_000)}}).result()
    counting = CountingStorage(storage)
    (line,) = inspect(counting).tensors
    assert line.nbytes == 400_000
    assert counting.total_nbytes < 10_000
    assert max(counting.requests.values()) == 1


def test_ranks_and_shards() -> None:
    storage = MemoryStorage("run")
    save_on(Size(2, 2), storage, 3)
    found = inspect(storage)
    assert [rank.shard for rank in found.ranks] == [0, 1, 0, 1]
    assert sum(rank.nbytes for rank in found.ranks) == found.nbytes == sum(file.nbytes for file in found.files)
    assert {line.name: (line.home, line.ranks) for line in found.tensors}["model.layer.weight"] == ("model", 4)


def test_what_is_lost_or_damaged_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (index,) = [(file.name, file) for file in inspect(tmp_path).files if file.kind == "model"]
    (tmp_path / "step_1/rank_0.pt").unlink()
    raw = (tmp_path / "step_1/model.pt").read_bytes()
    flip_byte(tmp_path / "step_1/model.pt", raw.index(b'"tensors"') + 3)
    found = inspect(tmp_path)
    assert [file.problem for file in found.files] == ["its index is damaged", "it is missing, or shorter than it was"]
    assert index[0] == "model.pt"
    assert {line.name for line in found.tensors} >= {"model.weight", "optimizer.momentum"}


def test_which_step_is_meant(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert inspect(tmp_path).step == 2
    assert inspect(tmp_path, step=1).step == inspect(tmp_path / "step_1").step == 1
    for where, step in ((tmp_path, 3), (tmp_path / "step_1", 2), (tmp_path / "step_1/model.pt", None)):
        with pytest.raises(sc.CheckpointNotFoundError):
            inspect(where, step=step)
    (tmp_path / "empty").mkdir()
    with pytest.raises(sc.CheckpointNotFoundError, match="no committed checkpoint"):
        inspect(tmp_path / "empty")
