"""Diff: what torch says of two states held in memory, said of two checkpoints that are not; through the seam, in any
pieces; and of real steps on other ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.format.index import ITEMSIZE
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import flip_byte
from shardckpt.testing.gangs import run_ranks
from shardckpt.tools.looking.diff import Difference, TensorDiff, ValueDiff, compare
from shardckpt.tools.looking.two import diff
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window
from tests.tools.making import save


class Held:
    """A source that is a dict of tensors and values; counts how large its windows are together."""

    def __init__(self, held: Mapping[str, Any], ties: Mapping[str, str] | None = None) -> None:
        self.ties = ties or {}
        self._held = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
        self.tensors = {
            name: TensorFacts(str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for name, value in self._held.items()
        }
        self.tree: Any = {name: TensorName(name) if name in self.tensors else value for name, value in held.items()}
        self.most = 0

    def read(self, windows: Sequence[Window]) -> None:
        self.most = max(self.most, sum(len(window.into) for window in windows))
        for window in windows:
            raw = self._held[window.name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            window.into[:] = raw[window.start : window.start + len(window.into)]

    def close(self) -> None:
        pass


def only(first: torch.Tensor, second: torch.Tensor, **how: Any) -> TensorDiff | None:
    found = compare(Held({"t": first}), Held({"t": second}), **how)
    assert (found.only_first, found.only_second, found.values, found.compared) == ((), (), (), 1)
    assert len(found.tensors) < 2
    return found.tensors[0] if found.tensors else None


NUMBERS = [dtype for name in ITEMSIZE if "bits" not in name and "_x2" not in name for dtype in [getattr(torch, name)]]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    one = torch.ones(5)
    other = torch.tensor([1.0, 0.0 if dtype == torch.bool else 2.0, 1.0, 1.0, 1.0])
    assert only(one.to(dtype), one.to(dtype)) is None
    found = only(one.to(dtype), other.to(dtype))
    assert found is not None
    assert (found.unequal, found.elements, found.max_abs, found.mean_abs) == (1, 5, 1.0, 0.2)


def test_what_is_no_number_is_compared_by_its_bytes() -> None:
    raw = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    packed = torch.float4_e2m1fn_x2
    found = only(raw.view(packed), torch.tensor([1, 2, 3, 5], dtype=torch.uint8).view(packed))
    assert found is not None
    assert (found.unequal, found.elements, found.max_abs, found.mean_abs) == (1, 4, None, None)
    assert only(raw.view(packed), raw.clone().view(packed)) is None


def test_large_integers_are_not_rounded() -> None:
    found = only(torch.tensor([1 << 62]), torch.tensor([(1 << 62) + 1]))
    assert found is not None
    assert found.unequal == 1


def test_what_is_not_finite_is_counted_by_itself() -> None:
    nan, inf = math.nan, math.inf
    one, other = torch.tensor([nan, nan, inf, inf, 1.0, 0.0, 2.0]), torch.tensor([nan, 1.0, inf, -inf, inf, -0.0, 5.0])
    found = only(one, other)
    assert found is not None
    assert (found.unequal, found.not_finite, found.max_abs, found.mean_abs) == (4, 3, 3.0, 0.75)
    assert only(torch.tensor([0.0, nan]), torch.tensor([-0.0, -nan])) is None


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=5),
    budget=st.integers(1, 4000),
    seed=st.integers(0, 9),
)
def test_any_budget_gives_what_torch_gives(shapes: list[tuple[int, ...]], budget: int, seed: int) -> None:
    torch.manual_seed(seed)
    ones = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    others = {name: torch.where(torch.rand_like(t) < 0.5, t, torch.randn_like(t)) for name, t in ones.items()}
    sources = Held(ones), Held(others)
    found = {line.name: line for line in compare(*sources, budget=budget).tensors}
    for name, one in ones.items():
        distance = (one.double() - others[name].double()).abs()
        if not distance.any():
            assert name not in found
            continue
        line = found[name]
        assert (line.unequal, line.max_abs) == (int((distance > 0).sum()), distance.max().item())
        assert line.mean_abs == pytest.approx(distance.mean().item())
    assert max(source.most for source in sources) <= max(budget // 8, 4)


def test_keys_shapes_dtypes_and_values() -> None:
    one = {
        "a": torch.ones(3),
        "b": torch.ones(3),
        "c": torch.ones(2, 2),
        "d": torch.ones(1),
        "x": 1,
        "y": [1, 2],
        "k": 3,
    }
    other = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(4),
        "c": torch.ones(2, 2),
        "e": torch.ones(1),
        "x": 1.0,
        "y": [1, 2],
        "k": torch.ones(3),
    }
    assert compare(Held(one), Held(other)) == Difference(
        only_first=("d",),
        only_second=("e",),
        tensors=(
            TensorDiff("a", ("float32", "bfloat16"), ((3,), (3,)), 0, 3, 0.0, 0.0),
            TensorDiff("b", ("float32", "float32"), ((3,), (4,))),
        ),
        values=(ValueDiff("x", ("1", "1.0")), ValueDiff("k", ("3", "a tensor, float32 [3]"))),
        compared=3,
        compared_values=2,
    )
    assert compare(Held(one), Held(other), only=["c", "y"]).is_none


def test_tied_tensors_are_read_once_and_told_twice() -> None:
    one, other = Held({"a": torch.zeros(4)}, {"b": "a"}), Held({"a": torch.ones(4), "b": torch.zeros(4)})
    assert [line.name for line in compare(one, other).tensors] == ["a"]
    both = Held({"a": torch.zeros(4)}, {"b": "a"}), Held({"a": torch.ones(4)}, {"b": "a"})
    assert [(line.name, line.max_abs, line.elements) for line in compare(*both).tensors] == [("a", 1, 4), ("b", 1, 4)]


def test_steps_of_other_ranks() -> None:
    """The same weights, saved by one rank and by three, are alike."""
    one, three, weights = MemoryStorage("one"), MemoryObjects("three"), torch.arange(1000.0).view(50, 20)

    def act(storage: Any, gangs: sc.Gangs | None = None) -> None:
        rank = gangs.root.rank if gangs else 0
        with sc.CheckpointManager(storage, gangs) as manager:
            state = {"model": {"w": weights}, "own": {"seed": torch.tensor([rank])}, "epoch": 3}
            manager.save(1, state, replicated=["model", "epoch"] if gangs else []).result()

    act(one)
    run_ranks(3, lambda gangs: act(three, gangs))
    found = diff(one, three)
    assert found.difference.is_none
    assert (found.difference.compared, found.own) == (2, ("own.seed",))
    with pytest.raises(ValueError, match="not by 2"):
        diff(one, three, rank=2)
    other = MemoryStorage("other")
    run_ranks(3, lambda gangs: act(other, gangs))
    assert diff(three, other, rank=2).difference.is_none


def test_damage_is_an_error_and_no_difference(tmp_path: Any) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1)
    raw = (tmp_path / "b/step_1/model.pt").read_bytes()
    flip_byte(tmp_path / "b/step_1/model.pt", raw.index(b"\x01" + b"\0" * 7 + b"\x01"))
    with pytest.raises(sc.CheckpointDamagedError, match=r"model\.pt"):
        diff(tmp_path / "a", tmp_path / "b")
    assert diff(tmp_path / "a", tmp_path / "b", only=["rng"]).difference.is_none
    with pytest.raises(sc.CheckpointNotFoundError):
        diff(tmp_path / "a", tmp_path / "a/step_2")
