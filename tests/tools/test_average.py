"""Averages of steps, against the same in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from shardckpt.errors import CheckpointMismatchError, CheckpointNotFoundError, InvalidStateError
from shardckpt.storage.memory import MemoryObjects
from tests.engine.states import Net
from tests.tools.moving.reading import same

DTYPES = ("float64", "float32", "bfloat16", "float16", "complex64")


def model(number: int) -> dict[str, torch.Tensor]:
    """Small, of many dtypes; odd sizes in front of wide elements."""
    torch.manual_seed(number)
    values = {"mask": torch.tensor([True, False, True]), "count": torch.tensor(7)}
    values |= {name: torch.randn(5, 3).to(getattr(torch, name)) for name in DTYPES}
    return values | {"endless": torch.tensor([float("-inf"), 1 / 3, 0.1])}


def save(root: Any, **models: Any) -> None:
    with sc.CheckpointManager(root) as manager:
        for name, content in models.items():
            manager.save(int(name[1:]), {"model": content, "progress": {"step": 1}}).result()


def loaded(root: Any, step: int) -> dict[str, torch.Tensor]:
    with sc.CheckpointManager(root) as manager:
        state = manager.load_checkpoint(step)
    assert list(state) == ["model"]
    return dict(state["model"])


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (1 / 3, 1 / 3, 1 / 3)),
        ({"weights": [0, 1, 3]}, (0.0, 0.25, 0.75)),
        ({"decay": 0.5}, (0.25, 0.25, 0.5)),
    ],
)
def test_means(tmp_path: Path, options: Any, shares: tuple[float, ...]) -> None:
    root: Any = MemoryObjects() if "decay" in options else tmp_path / "run"
    models = [model(number) for number in range(3)]
    save(root, s1=models[0], s2=models[1], s3=models[2])
    report = sc.average([(root, 1), (root, 2), root], root, step=4, **options)
    assert report.weights == pytest.approx(shares)
    assert (report.step, report.tensors, report.form) == (4, 8, "shardckpt")
    found = loaded(root, 4)
    assert list(found) == list(models[0])
    for name, value in found.items():
        assert value.dtype == models[0][name].dtype
        if name in DTYPES:
            exact = sum(share * each[name].to(torch.complex128) for share, each in zip(shares, models, strict=True))
            tolerance = {"bfloat16": 2**-8, "float16": 2**-11, "float64": 1e-15}.get(name, 1e-6)
            assert torch.allclose(value.to(torch.complex128), exact, rtol=tolerance, atol=tolerance), name
        else:
            assert torch.equal(value, models[0][name]), name
    (found_step,) = [each for each in sc.verify(root).steps if each.step == 4]
    assert (found_step.problems, found_step.standing) == ((), "committed")


def test_rounding_happens_once(tmp_path: Path) -> None:
    """In bfloat16 the sum of these would stop growing."""
    values = [{"w": torch.full((3,), 1 + number / 128, dtype=torch.bfloat16)} for number in range(8)]
    save(tmp_path / "run", **{f"s{number}": value for number, value in enumerate(values)})
    sc.average([(tmp_path / "run", number) for number in range(8)], tmp_path / "out.safetensors", form="safetensors")
    mean = torch.stack([value["w"].float() for value in values]).mean(0).bfloat16()
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], mean)


def test_ties_stay_and_the_result_loads(tmp_path: Path) -> None:
    one, two, fresh = Net(), Net(), Net()
    save(tmp_path / "run", s1=one, s2=two)
    sc.average([tmp_path / "run/step_1", tmp_path / "run/step_2"], tmp_path / "out.pt", form="pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    fresh.load_state_dict(found)
    assert torch.allclose(fresh.body.weight, (one.body.weight + two.body.weight) / 2)


def test_alike_stays_alike_and_small_budgets_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    value = {"w": torch.randn(3, 1 << 18), "n": torch.randint(0, 9, (5,), dtype=torch.uint8), "b": torch.randn(7)}
    save(tmp_path / "run", s1=value, s2=value, s3=value)
    steps = [(tmp_path / "run", number) for number in (1, 2, 3)]
    told: list[int] = []
    means = sc.Means(budget_nbytes=1, told=lambda step, nbytes, total: told.append(nbytes))
    sc.average(steps, tmp_path / "new", means=means)
    assert same(loaded(tmp_path / "new", 3), value)
    assert sum(told) == 2 * sum(each.nbytes for each in value.values())


def test_integers_are_equal_or_the_last_ones(tmp_path: Path) -> None:
    save(tmp_path / "run", s1={"w": torch.zeros(2), "n": torch.tensor(1), "m": torch.tensor([True])})
    save(tmp_path / "run", s2={"w": torch.ones(2), "n": torch.tensor(2), "m": torch.tensor([False])})
    steps = [(tmp_path / "run", 1), (tmp_path / "run", 2)]
    with pytest.raises(InvalidStateError, match=r"model\.n, model\.m: no numbers"):
        sc.average(steps, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    sc.average(steps, tmp_path / "new", integers="last")
    assert same(
        loaded(tmp_path / "new", 2), {"w": torch.full((2,), 0.5), "n": torch.tensor(2), "m": torch.tensor([False])}
    )


def test_all_differences_are_told_at_once(tmp_path: Path) -> None:
    save(tmp_path / "run", s1={"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
    save(tmp_path / "run", s2={"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(4), "d": torch.zeros(1)})
    with pytest.raises(CheckpointMismatchError, match="cannot be averaged") as caught:
        sc.average([(tmp_path / "run", 1), (tmp_path / "run", 2)], tmp_path / "new")
    assert caught.value.problems == (
        "model.c is not in number 2",
        "model.d is in number 2, not in the first",
        "model.a is float32[2] in the first, float64[2] in number 2",
        "model.b is float32[3] in the first, float32[4] in number 2",
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1]},
        {"weights": [0, 0]},
        {"weights": [-1, 2]},
        {"weights": [float("nan"), 1]},
        {"decay": 1.0},
        {"weights": [1, 1], "decay": 0.5},
        {"form": "stone"},
        {"integers": "first"},
    ],
)
def test_wrong_arguments(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=r"weight|decay|form|integers"):
        sc.average([tmp_path, tmp_path], tmp_path / "new", **options)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to be averaged"):
        sc.average([], tmp_path / "new")
    with sc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"progress": {"step": 1}}).result()
    for source in ((tmp_path / "run", 2), tmp_path / "run"):
        with pytest.raises(CheckpointNotFoundError):
            sc.average([source], tmp_path / "new")
