"""A plan that is made again is the plan that would be made anew, whatever has changed; and it holds no tensor."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.saving import again as again_module
from shardckpt.engine.saving.again import Planner
from shardckpt.engine.saving.plan import SavePlan, plan_save
from shardckpt.errors import InvalidStateError
from shardckpt.state import StateReader

ALONE = Coordinates(0, 1, 0, 1, (0,))


def told(plan: SavePlan) -> Any:
    """All that a plan says, tensors by what they are made of."""

    def tensor(t: torch.Tensor) -> Any:
        return t.dtype, t.shape, t.stride(), t.requires_grad, t.resolve_conj().resolve_neg().tolist()

    files = [
        (f.name, f.home, [(tensor(r[0]), *r[1:]) for r in f.records], f.boxes, f.tree.encode(), f.values, f.sharers)
        for f in plan.files
    ]
    alike = {group: [(name, tensor(t)) for name, t in those] for group, those in plan.alike.items()}
    return files, plan.meshes, plan.layouts, plan.table, dict(plan.values), alike, plan.copied


def check(planner: Planner, state: dict[str, Any], **terms: Any) -> None:
    reader = StateReader()
    expected = plan_save(reader.take_apart(state), ALONE, **terms)
    assert told(planner.plan(reader.take_apart(state), **terms)) == told(expected)


def some_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].bias = torch.nn.Parameter(torch.zeros(4))
    tied = torch.randn(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "plain": {"a": tied, "b": tied, "view": tied.t(), "none": torch.zeros(0, 2), "mixed": [1, torch.ones(2)]},
        "progress": {"step": 1, "losses": [0.5], "name": "x", "empty": {}},
        "rng": sc.RngState(),
    }


def swap_data(state: dict[str, Any]) -> None:
    state["model"][0].weight.data = torch.randn(4, 3)


def swap_dtype(state: dict[str, Any]) -> None:
    state["model"][0].weight.data = torch.randn(4, 3, dtype=torch.float64)


def reshape_in_place(state: dict[str, Any]) -> None:
    state["plain"]["a"].t_()


def untie(state: dict[str, Any]) -> None:
    state["plain"]["b"] = state["plain"]["b"].clone()


def tie(state: dict[str, Any]) -> None:
    state["plain"]["none"] = state["plain"]["a"]


def conjugate(state: dict[str, Any]) -> None:
    state["plain"]["z"] = state["plain"].get("z", torch.randn(3, dtype=torch.complex64)).conj()


def change_values(state: dict[str, Any]) -> None:
    state["progress"]["step"] += 1
    state["progress"]["losses"].append(random.random())


def change_type_of_value(state: dict[str, Any]) -> None:
    state["progress"]["step"] = float(state["progress"]["step"])


def change_learning_rate(state: dict[str, Any]) -> None:
    state["optimizer"].param_groups[0]["lr"] *= 0.5


def add_key(state: dict[str, Any]) -> None:
    state["plain"][f"new {len(state['plain'])}"] = torch.ones(3)


def drop_key(state: dict[str, Any]) -> None:
    state["plain"].pop("view", None)


def reorder(state: dict[str, Any]) -> None:
    state["plain"] = dict(reversed(state["plain"].items()))


def value_for_tensor(state: dict[str, Any]) -> None:
    state["plain"]["mixed"] = [1, 2]


def empty_for_value(state: dict[str, Any]) -> None:
    state["progress"]["name"] = {}


def nothing(state: dict[str, Any]) -> None:
    pass


CHANGES = [swap_data, swap_dtype, reshape_in_place, untie, tie, conjugate, change_values, change_type_of_value,
           change_learning_rate, add_key, drop_key, reorder, value_for_tensor, empty_for_value, nothing]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change_is_seen(change: Any) -> None:
    planner, state = Planner(ALONE), some_state()
    check(planner, state)
    check(planner, state)
    for _ in range(2):
        change(state)
        check(planner, state)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), max_size=6))
def test_changes_one_after_the_other(changes: list[Any]) -> None:
    planner, state = Planner(ALONE), some_state()
    for change in changes:
        change(state)
        check(planner, state)


def test_other_terms_make_another_plan() -> None:
    planner, state = Planner(ALONE), some_state()
    for terms in ({}, {"replicated": ("progress",)}, {"model_key": "plain"}, {"replicated": "*"}, {}):
        check(planner, state, **terms)


def test_the_same_state_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, state, reader = Planner(ALONE), some_state(), StateReader()
    first = planner.plan(reader.take_apart(state))
    monkeypatch.setattr(again_module, "plan_save", lambda *_, **__: pytest.fail("planned anew"))
    change_values(state)
    second = planner.plan(reader.take_apart(state))
    assert all(one.boxes is other.boxes for one, other in zip(first.files, second.files, strict=True))
    assert second.notes is first.notes


def test_no_tensor_is_held(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        state = {"model": torch.nn.Linear(300, 300), "plain": torch.ones(3)}
        for step in range(3):
            checkpoints.save(step, state).result()
        checkpoints._saver._thread.submit(lambda: None).result()  # it has left the last save
        wanted = {(tensor.data_ptr(), tensor.shape) for tensor in (state["model"].weight, state["plain"])}
        shapes = {shape for _, shape in wanted}
        del state
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)  # other tests keep some that have no memory: sparse ones
        alike = [t for t in gc.get_objects() if type(t) in kinds and t.layout is torch.strided and t.shape in shapes]
        assert [tensor for tensor in alike if (tensor.data_ptr(), tensor.shape) in wanted] == []


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse).*")
def test_what_cannot_be_stored_is_said_each_time() -> None:
    planner, state, reader = Planner(ALONE), some_state(), StateReader()
    check(planner, state)
    whole, rows = torch.ones(4, 4), [torch.ones(2), torch.ones(3)]
    odd = [whole.to_sparse(), whole.to_sparse_csr(), whole.to_sparse_bsr((2, 2)), whole.to_mkldnn()]
    odd += [torch.nested.nested_tensor(rows, layout=layout) for layout in (torch.strided, torch.jagged)]
    odd += [torch.nn.Parameter(whole.to_sparse())]
    for bad in (*odd, object(), lambda: 0):
        state["progress"]["name"] = bad
        for _ in range(2):
            with pytest.raises(InvalidStateError, match=r"progress\.name"):
                planner.plan(reader.take_apart(state))
    state["progress"]["name"] = "good again"
    check(planner, state)


def test_a_state_that_holds_itself_is_said_each_time() -> None:
    planner, reader = Planner(ALONE), StateReader()
    ring: dict[str, Any] = {"a": 1}
    ring["list"] = [ring]
    for _ in range(2):
        with pytest.raises(InvalidStateError):
            planner.plan(reader.take_apart({"ring": ring}))
