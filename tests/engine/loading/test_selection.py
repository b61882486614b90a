"""Loads of some of a state: what is included is loaded, the rest stays and is told of; nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.gangs import run_ranks
from tests.engine.states import Counter, snapshot, train, training

LAYERS = 4


def tensors(count: int, value: float, layers: str = "layers") -> dict[str, torch.Tensor]:
    found = {
        f"{layers}.{i}.{name}": torch.full((3, i + 1), float(value + i)) for i in range(count) for name in ("w", "bias")
    }
    return {**found, "head.w": torch.full((2,), float(value))}


@pytest.fixture
def storage() -> Storage:
    """A step of four layers and a head, all from 10 upwards, with a value and an object of its own."""
    storage, counter = MemoryStorage("run"), Counter()
    counter.count("saved")
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, {"model": tensors(LAYERS, 10), "lr": 0.5, "counter": counter}).result()
    return storage


def load(storage: Storage | Path, state: dict[str, Any], **policy: Any) -> sc.CheckpointInfo:
    with sc.CheckpointManager(storage) as checkpoints:
        return checkpoints.load(1, state, policy=sc.LoadPolicy(**policy))


def refuse(storage: Storage, state: dict[str, Any], **policy: Any) -> tuple[str, ...]:
    """The problems of a load that must change nothing."""
    before = {name: tensor.clone() for name, tensor in state["model"].items()}
    with pytest.raises(sc.CheckpointMismatchError) as caught:
        load(storage, state, **policy)
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in before.items())
    return caught.value.problems


def loaded(state: Mapping[str, torch.Tensor], was: float = 0) -> set[str]:
    """The names of tensors that are no more what `tensors` made."""
    layer = {name: float(name.split(".")[1]) if name.startswith("la") else 0.0 for name in state}
    return {name for name, tensor in state.items() if not tensor.eq(was + layer[name]).all()}


def test_included_and_excluded(storage: Storage) -> None:
    state = {"model": tensors(LAYERS, 0), "lr": 0.0}
    info = load(storage, state, include=["model.layers.*", "lr"], exclude=["*.bias", "model.layers.2"])
    assert loaded(state["model"]) == {"layers.0.w", "layers.1.w", "layers.3.w"}
    assert state["model"]["layers.3.w"].eq(13).all()
    assert state["lr"] == 0.5
    left = {"model.head.w", "model.layers.2.w", *(f"model.layers.{i}.bias" for i in range(LAYERS))}
    assert info.left == dict.fromkeys(left, "not included, or excluded")


def test_what_is_not_asked_for_need_not_be_there(storage: Storage) -> None:
    """Neither in the checkpoint nor in the state; but what is asked for must be in both."""
    state = {"model": {**tensors(LAYERS, 0), "adapter.w": torch.zeros(2)}, "new": 1}
    del state["model"]["head.w"]
    load(storage, state, include=["model.layers"])
    load(storage, state, exclude=["model.adapter", "model.head", "new"])
    assert refuse(storage, state, exclude=["model.adapter", "new"]) == (
        "unexpected: model.head.w is in the checkpoint but not in the state (nearest: model.adapter.w)",
    )
    (problem,) = refuse(storage, state, exclude=["model.head", "new"])
    assert problem.startswith("missing: model.adapter.w is in the state but not in the checkpoint")


def test_only_the_model_of_a_full_step_whatever_has_become_of_the_rest(tmp_path: Path) -> None:
    one = training()
    train(one, 2)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, one).result()
    (tmp_path / "step_1/rank_0.pt").unlink()
    other = training(seed=5)
    before = snapshot(other)
    with pytest.raises(sc.CheckpointDamagedError):
        load(tmp_path, other)
    info = load(tmp_path, other, include=["model"])
    assert {"optimizer", "scheduler", "counter", "rng", "progress.step"} <= info.left.keys()
    assert not [name for name in info.left if name.startswith("model")]
    after = snapshot(other)
    assert all(torch.equal(value, after["model"][name]) for name, value in snapshot(one)["model"].items())
    assert (after["groups"], after["counter"]) == (before["groups"], before["counter"])
    assert not other["optimizer"].state  # it had none, and has none


def test_a_step_of_the_model_alone(tmp_path: Path) -> None:
    one, other = training(), training(seed=5)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, one).result()
        checkpoints.delete_checkpoint(1, preserve_model=True)
        with pytest.raises(sc.CheckpointMismatchError, match="only the model is there"):
            checkpoints.load(1, other)
        assert checkpoints.resume(other, policy=sc.LoadPolicy(include=["model.*"])) is not None
    assert torch.equal(other["model"].embed.weight, one["model"].embed.weight)


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ({"include": ["model.*", "modle.*"]}, "include: 'modle.*' matches no key of the state"),
        ({"include": ["model", "counter"]}, "include: 'counter' matches no key of the state"),
        ({"exclude": ["model.tail"]}, "exclude: 'model.tail' matches no key of the state, and none of the checkpoint"),
        (
            {"rename": {"model.tail": "model.head"}},
            "rename: 'model.tail' (to 'model.head') matches no key of the state",
        ),
        (
            {"rename": {"model.head": "model.tail"}, "missing": "keep", "unexpected": "ignore"},
            "rename: 'model.head' is in the state, but 'model.tail' is not in the checkpoint",
        ),
        (
            {"include": ["model"], "exclude": ["model.*"]},
            "include, exclude: together they leave nothing of the state to be loaded",
        ),
    ],
)
def test_what_matches_nothing_is_an_error(storage: Storage, policy: dict[str, Any], problem: str) -> None:
    assert refuse(storage, {"model": tensors(LAYERS, 0), "lr": 0.0}, **policy) == (problem,)


def test_other_names(storage: Storage) -> None:
    state = {"net": {"blocks.0.w": torch.zeros(3, 1), "blocks.1.w": torch.zeros(3, 2), "tail.w": torch.zeros(2)}}
    names = {"net": "model", "net.blocks.*.w": "model.layers.*.w", "net.tail": "model.head"}
    policy = {"rename": names, "exclude": ["net.*.bias", "net.blocks.[23]"]}
    assert load(storage, state, **policy).left == {}
    assert [state["net"][name].unique().item() for name in ("blocks.0.w", "blocks.1.w", "tail.w")] == [10, 11, 10]


def test_a_name_that_is_not_there_is_told_with_the_other(storage: Storage) -> None:
    state = {"model": {"body.9.w": torch.zeros(3, 1), "body.1.w": torch.zeros(3, 5)}}
    problems = refuse(storage, state, rename={"model.body": "model.layers"}, unexpected="ignore")
    assert problems == (
        "missing: model.body.9.w is in the state but not in the checkpoint (as model.layers.9.w) "
        "(nearest: model.layers.3.w)",
        "shape: model.layers.1.w (model.body.1.w in the state) is [3, 2] in the checkpoint, [3, 5] in the state",
    )


def test_several_from_one(storage: Storage) -> None:
    """As for an average of the weights that begins with them; the checkpoint's own name holds as well."""
    state = {"model": tensors(LAYERS, 0), "ema": tensors(LAYERS, 0)}
    load(storage, state, rename={"ema": "model"})
    assert all(torch.equal(state["ema"][name], tensor) for name, tensor in tensors(LAYERS, 10).items())
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in tensors(LAYERS, 10).items())


@pytest.mark.parametrize("count", [2, 6])
def test_fewer_and_more_layers(storage: Storage, count: int) -> None:
    state = {"model": tensors(count, 0, "blocks")}
    rename = {"model.blocks": "model.layers"}
    policy = {"missing": "keep"} if count > LAYERS else {"unexpected": "ignore"}
    info = load(storage, state, rename=rename, **policy)
    assert state["model"]["blocks.1.w"].eq(11).all()
    added = {f"model.blocks.{i}.{name}" for i in range(LAYERS, count) for name in ("w", "bias")}
    assert info.left == dict.fromkeys(added, "not in the checkpoint")
    assert len(refuse(storage, {"model": tensors(count, 0, "blocks")}, rename=rename)) == 4


def test_what_loads_itself_is_taken_as_a_whole(storage: Storage) -> None:
    counter = Counter()
    state = {"model": tensors(LAYERS, 0), "counter": counter}
    (problem,) = refuse(storage, state, exclude=["counter.histogram"])
    assert problem.startswith("include, exclude: counter is loaded as a whole or not at all, but counter.seen")
    assert load(storage, state, exclude=["counter"]).left == {"counter": "not included, or excluded"}
    assert counter.seen == {}
    load(storage, state, include=["counter.*"])
    assert counter.seen == {"saved": 1}
    other = {"model": tensors(LAYERS, 0), "meter": Counter()}
    load(storage, other, rename={"meter": "counter"})
    assert other["meter"].seen == {"saved": 1}
    problem = refuse(storage, {**other, "meter": counter}, rename={"meter.seen": "counter.seen"})[0]
    assert problem.startswith("rename: meter.seen.saved lies in meter, which is loaded as a whole")


class Wrapped(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, nn.Linear(4, 3))
        self.head = nn.Linear(3, 2)


def trained(name: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(steps)
    model = Wrapped(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (steps + 1))
    for _ in range(steps):
        model.head(getattr(model, name)(torch.randn(5, 4))).square().sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_an_optimizer_whose_parameters_have_other_names() -> None:
    storage, saved, state = MemoryObjects(), trained("encoder", 3), trained("body", 0)
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, saved).result()
    rename = {"model.body": "model.encoder"}
    with pytest.raises(sc.CheckpointMismatchError, match=r"optimizer\.state\.encoder"):
        load(storage, state, rename=rename)
    assert not state["optimizer"].state
    load(storage, state, rename={**rename, "optimizer.state.body": "optimizer.state.encoder"})
    ours, theirs = (s["optimizer"].state_dict() for s in (state, saved))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, moments in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][name], value) for name, value in moments.items())


@pytest.mark.parametrize("in_place", [False, True])
def test_straight_into_the_state(tmp_path: Path, in_place: bool) -> None:
    one = {"model": {f"{i}.w": torch.full((64, 300), float(i)) for i in range(6)}}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, one).result()
    state = {"model": {f"{i}.w": torch.full((64, 300), -1.0) for i in range(3)}, "again": {"w": torch.zeros(64, 300)}}
    rename = {"model.*.w": "model.*.w", "again": "model.5"}
    load(tmp_path, state, exclude=["model.1", "model.[345]"], rename=rename, in_place=in_place)
    assert [int(state["model"][f"{i}.w"].unique().item()) for i in range(3)] == [0, -1, 2]
    assert state["again"]["w"].eq(5).all()


def test_ranks_read_once_what_all_of_them_take_of_an_object_store() -> None:
    storage = MemoryObjects()
    large = {f"{name}.w": torch.full((700, 1000), value) for name, value in (("a", 1.0), ("b", 2.0))}

    def save(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.save(1, {"model": large, "own": gangs.root.rank}, replicated=["model"]).result()

    def read(gangs: sc.Gangs) -> list[Any]:
        state = {"net": {"b.w": torch.zeros(700, 1000)}, "own": -1}
        with sc.CheckpointManager(storage, gangs) as manager:
            policy = sc.LoadPolicy(rename={"net": "model"}, exclude=["net.a", "own"])
            info = manager.load(1, state, policy=policy)
        assert info.left == {"own": "not included, or excluded"}
        return [state["net"]["b.w"].unique().item(), state["own"]]

    run_ranks(2, save)
    assert run_ranks(3, read) == [[2.0, -1]] * 3


def test_ranks_that_say_different_things_are_all_told(storage: Storage) -> None:
    def read(gangs: sc.Gangs) -> tuple[str, ...]:
        policy = sc.LoadPolicy(include=["model"] if gangs.root.rank else [])
        with sc.CheckpointManager(storage, gangs) as manager, pytest.raises(sc.CheckpointMismatchError) as caught:
            manager.load(1, {"model": tensors(LAYERS, 0)}, policy=policy)
        return caught.value.problems

    told = ("policy: include, exclude and rename are others on rank 1 than on rank 0; give all the same",)
    assert run_ranks(2, read) == [told] * 2


def test_a_pattern_may_be_for_other_ranks(storage: Storage) -> None:
    """As between pipeline stages, each of which has layers of its own."""

    def read(gangs: sc.Gangs) -> float:
        number = gangs.root.rank
        state = {"model": {f"layers.{number}.w": torch.zeros(3, number + 1)}}
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.load(1, state, policy=sc.LoadPolicy(include=["model.layers.0.w", "model.layers.1.w"]))
        return state["model"][f"layers.{number}.w"].unique().item()

    assert run_ranks(2, read) == [10.0, 11.0]
