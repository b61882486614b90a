"""A step as a source: every tensor bit for bit, by any windows; ties, values, ranks; damage is found."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.tools.moving.seam import TensorName, Window
from shardckpt.tools.moving.step import StepSource
from tests.engine.states import training
from tests.manager.transactions import Size, equal, on_ranks, state_of, transact
from tests.tools.moving.reading_whole import nested_of, whole_of


def saved(root: Any, step: int = 3) -> dict[str, Any]:
    state = training()
    with sc.CheckpointManager(root) as checkpoints:
        checkpoints.save(step, state).result()
    return state


@pytest.mark.parametrize("place", [MemoryStorage, MemoryObjects, None])
@pytest.mark.parametrize("window", [None, 1000])
def test_a_step_gives_back_what_was_saved(tmp_path: Path, place: Any, window: int | None) -> None:
    root = place() if place is not None else tmp_path / "run"
    state = saved(root)
    with StepSource.open(root) as source:
        tree = nested_of(source, window=window)
        equal(tree["model"], {**state["model"].state_dict()})
        assert dict(source.ties) == {"model.head.weight": "model.embed.weight"}
        assert tree["progress"]["step"] == 0
        assert tree["nothing"] == {}
        assert source.differ == ()


def test_a_part_opens_only_that(tmp_path: Path) -> None:
    state = saved(tmp_path)
    with StepSource.open(tmp_path / "step_3", part="model") as source:
        assert {name.removeprefix("model.") for name in {**source.tensors, **source.ties}} == {
            *state["model"].state_dict()
        }
        assert set(source.tree) == {"model"}


def test_windows_in_any_order_that_begin_anywhere(tmp_path: Path) -> None:
    state = saved(tmp_path)
    value = state["model"].embed.weight.detach()
    with StepSource.open(tmp_path, budget_nbytes=4096) as source:
        cuts = sorted({0, value.nbytes, *random.Random(3).sample(range(value.nbytes), 20)})
        content = memoryview(bytearray(value.nbytes))
        windows = [Window("model.embed.weight", a, content[a:b]) for a, b in itertools.pairwise(cuts)]
        random.Random(4).shuffle(windows)
        for window in windows:
            source.read([window])
        assert bytes(content) == value.numpy().tobytes()


@pytest.mark.parametrize("window", [None, 999])
def test_a_flipped_bit_is_found_with_the_last_byte_of_its_tensor(tmp_path: Path, window: int | None) -> None:
    state = saved(tmp_path)
    file = tmp_path / "step_3" / "model.pt"
    content = bytearray(file.read_bytes())
    at = content.index(state["model"].body.weight.detach().numpy().tobytes())
    content[at + 1234] ^= 4
    file.write_bytes(content)
    with StepSource.open(tmp_path) as source:
        whole_of(source, "model.embed.weight", window=window)
        with pytest.raises(sc.CheckpointDamagedError, match=r"model\.pt"):
            whole_of(source, "model.body.weight", window=window)
        with pytest.raises(sc.CheckpointDamagedError, match=r"model\.pt"):  # and again
            whole_of(source, "model.body.weight", window=window)


def test_a_file_that_is_cut_off_is_damage(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "step_3" / "model.pt"
    with StepSource.open(tmp_path) as source:
        file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(sc.CheckpointDamagedError):
            nested_of(source)


def test_ranks_that_hold_other_things(tmp_path: Path) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 5, state_of(gangs, ("model",)), replicated_keys={"model"})

    on_ranks(Size(2), tmp_path, act)
    for rank in (0, 1):
        with StepSource.open(tmp_path, rank=rank) as source:
            tree = nested_of(source)
            assert torch.equal(tree["model"]["layer.weight"], torch.arange(12.0).view(3, 4))
            assert torch.equal(
                tree["optimizer"]["state"][0]["exp_avg"], torch.arange(12.0).view(3, 4) + 10 * (1 + rank)
            )
            assert tree["step_nr"] == 10 * (1 + rank)
            assert source.differ == ("optimizer.state.0.exp_avg",)
    with pytest.raises(ValueError, match="not by 2"):
        StepSource.open(tmp_path, rank=2)


def test_what_is_not_there(tmp_path: Path) -> None:
    saved(tmp_path)
    for where, step in ((tmp_path, 4), (tmp_path / "step_4", None), (tmp_path / "step_3", 4), (tmp_path / "no", None)):
        with pytest.raises(sc.CheckpointNotFoundError):
            StepSource.open(where, step=step)


def test_a_tree_names_tied_tensors_too(tmp_path: Path) -> None:
    saved(tmp_path)
    with StepSource.open(tmp_path) as source:
        names = {leaf.name for leaf in _leaves(source.tree) if isinstance(leaf, TensorName)}
        assert {"model.head.weight", "model.embed.weight"} <= names
        assert names == {*source.tensors, *source.ties}


def _leaves(node: Any) -> list[Any]:
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
    return [node] if below is None else [leaf for item in below for leaf in _leaves(item)]
