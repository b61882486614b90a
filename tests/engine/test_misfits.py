"""State and checkpoint that do not fit: every difference in one error, each kind allowed by a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.loading.selecting import comparing
from shardckpt.gang import LocalGang


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tensors = {f"layer{i}.weight": torch.full((4, i + 1), float(i)) for i in range(10)}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": tensors, "lr": 0.5, "step": 3}).result()
    return tmp_path


def wanted() -> dict:
    return {"model": {f"layer{i}.weight": torch.zeros(4, i + 1) for i in range(10)}, "lr": 0.0, "step": 0}


def load(root: Path, state: dict, **policy: str) -> None:
    with sc.CheckpointManager(root) as checkpoints:
        checkpoints.load(1, state, policy=sc.LoadPolicy(**policy))  # type: ignore[arg-type]


def test_ten_at_a_time_with_the_nearest_name(root: Path) -> None:
    state = wanted()
    for i in range(10):
        state["model"][f"layr{i}.weight"] = state["model"].pop(f"layer{i}.weight")
    with pytest.raises(sc.CheckpointMismatchError) as caught:
        load(root, state)
    problems = caught.value.problems
    assert len([p for p in problems if p.startswith("missing")]) == 10
    assert len([p for p in problems if p.startswith("unexpected")]) == 10
    assert (
        "missing: model.layr3.weight is in the state but not in the checkpoint (nearest: model.layer3.weight)"
        in problems
    )
    assert all(problem in str(caught.value) for problem in problems)
    assert state["lr"] == 0.0
    assert not any(tensor.any() for tensor in state["model"].values())


def test_every_kind_in_one_error(root: Path) -> None:
    state = wanted()
    del state["model"]["layer0.weight"]
    state["model"]["other.weight"] = torch.zeros(2)
    state["model"]["layer1.weight"] = torch.zeros(4, 7)
    state["model"]["layer2.weight"] = torch.zeros(4, 3, dtype=torch.bfloat16)
    state["lr"] = torch.zeros(1)
    state["model"]["layer3.weight"] = 3
    with pytest.raises(sc.CheckpointMismatchError) as caught:
        load(root, state)
    kinds = sorted(problem.split(":")[0] for problem in caught.value.problems)
    assert kinds == ["dtype", "kind", "kind", "missing", "shape", "unexpected"]
    assert caught.value.step == 1


def test_missing_kept(root: Path) -> None:
    state = wanted()
    state["model"]["new"] = torch.full((2,), 9.0)
    load(root, state, missing="keep")
    assert state["model"]["new"].tolist() == [9.0, 9.0]
    assert state["model"]["layer4.weight"].eq(4).all()
    assert (state["lr"], state["step"]) == (0.5, 3)


def test_unexpected_ignored(root: Path) -> None:
    state = wanted()
    del state["model"]["layer4.weight"]
    load(root, state, unexpected="ignore")
    assert state["model"]["layer5.weight"].eq(5).all()


def test_shape_kept(root: Path) -> None:
    state = wanted()
    state["model"]["layer4.weight"] = torch.full((1,), 8.0)
    load(root, state, shape="keep")
    assert state["model"]["layer4.weight"].tolist() == [8.0]
    assert state["model"]["layer5.weight"].eq(5).all()


@pytest.mark.parametrize(("policy", "value"), [("keep", 0), ("cast", 4)])
def test_dtype_kept_or_cast(root: Path, policy: str, value: int) -> None:
    state = wanted()
    state["model"]["layer4.weight"] = torch.zeros(4, 5, dtype=torch.int32)
    load(root, state, dtype=policy)
    assert state["model"]["layer4.weight"].eq(value).all()


def test_parts_that_are_not_asked_for_are_not_unexpected(root: Path) -> None:
    state = {"step": 0}
    load(root, state)
    assert state == {"step": 3}


def test_a_step_that_is_not_there(root: Path) -> None:
    with sc.CheckpointManager(root) as checkpoints, pytest.raises(sc.CheckpointNotFoundError) as caught:
        checkpoints.load(7, wanted())
    assert caught.value.step == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: 0, "model.bad"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "dequantised"),
        (Path("x"), "PosixPath"),
    ],
    ids=["function", "sparse", "meta", "quantised", "object"],
)
def test_what_cannot_be_stored_is_named_at_once(tmp_path: Path, value: object, message: str) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(sc.InvalidStateError, match=r"model\.bad") as caught:
            checkpoints.save(1, {"model": {"good": torch.ones(2), "bad": value}})
        assert message in str(caught.value)
        assert checkpoints.steps() == []
        checkpoints.save(2, {"model": {"good": torch.ones(2)}}).result()
        assert checkpoints.steps() == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2"]


def test_a_rank_tells_of_no_more_than_is_told_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of ranks with another model altogether: all that each could say is more than a store takes."""
    told, gather = list[Any](), LocalGang.gather

    def overheard(gang: LocalGang, value: Any, **terms: Any) -> Any:
        told.append(value)
        return gather(gang, value, **terms)

    monkeypatch.setattr(comparing, "_MOST", 3)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {f"saved{i}": torch.zeros(2) for i in range(10)}}).result()
        monkeypatch.setattr(LocalGang, "gather", overheard)
        with pytest.raises(sc.CheckpointMismatchError) as caught:
            checkpoints.load(1, {"model": {f"other{i}": torch.zeros(2) for i in range(10)}})
    assert len(caught.value.problems) == 3
    assert [len(value[1][0]) for value in told if value[1] and isinstance(value[1][0], list)] == [3]
