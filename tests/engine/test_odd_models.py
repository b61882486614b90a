"""What a model holds besides parameters: extra state, however it is given out; averages of it; tied weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardckpt as sc
from tests.manager.transactions import equal, same


class Extra(nn.Module):
    """Its extra state is a copy each time, as that of modules which pack something."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.value = value

    def get_extra_state(self) -> Any:
        return _copy(self.value)

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def resume(root: Path, saved: dict[str, Any], fresh: dict[str, Any], **policy: Any) -> None:
    with sc.CheckpointManager(root, sc.Gangs.local()) as manager:
        manager.save(1, saved).result()
        manager.resume(fresh, policy=sc.LoadPolicy(**policy))


EXTRA: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "bytes": (b"packed", b""),
    "tensor": (torch.arange(3), torch.zeros(3, dtype=torch.int64)),
    "tensor of another size": (torch.arange(3), torch.zeros(5)),
    "empty tensor": (torch.zeros(0), torch.ones(2)),
    "dict of tensors": ({"scale": torch.ones(3), "names": ["a"]}, {"scale": torch.zeros(1), "names": []}),
    "other keys": ({"a": {"b": torch.ones(2)}, "c": 1}, {"d": 1}),
    "nothing yet": ({"amax": torch.ones(4)}, None),
    "nothing any more": (None, {"amax": torch.ones(4)}),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", EXTRA)
def test_extra_state_comes_back_as_it_was(tmp_path: Path, name: str, in_place: bool) -> None:
    saved, fresh = (nn.Sequential(Extra(value), nn.Linear(2, 2)) for value in EXTRA[name])
    resume(tmp_path, {"model": saved}, {"model": fresh}, in_place=in_place)
    one, other = saved[0], fresh[0]
    assert isinstance(one, Extra)
    assert isinstance(other, Extra)
    equal(other.value, one.value)
    equal(dict(fresh.state_dict()), dict(saved.state_dict()))


def test_extra_state_that_was_not_saved(tmp_path: Path) -> None:
    """It is missing, or kept, as any other key."""
    plain, fresh = nn.ModuleDict({"it": nn.Module()}), nn.ModuleDict({"it": Extra(torch.ones(1))})
    plain["it"].weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(sc.CheckpointMismatchError, match=r"missing: model\.it\._extra_state"):
        resume(tmp_path, {"model": plain}, {"model": fresh})
    resume(tmp_path, {"model": plain}, {"model": fresh}, missing="keep")
    equal((fresh["it"].value, fresh["it"].weight.tolist()), (torch.ones(1), [0.0, 0.0]))


def averaged(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number in range(1 + seed):
        model(torch.randn(4, 3))
        for parameter in model.parameters():
            parameter.data.add_(number)
        average.update_parameters(model)
    return {"model": model, "ema": average, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def tied(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["words"].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model["head"](model["words"](torch.arange(5))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("make", [averaged, tied])
def test_copies_and_ties(tmp_path: Path, make: Callable[[int], dict[str, Any]]) -> None:
    saved, fresh = make(2), make(0)
    resume(tmp_path, saved, fresh)
    for key, part in saved.items():
        assert same(dict(fresh[key].state_dict()), dict(part.state_dict())), key
    if make is tied:
        assert fresh["model"]["head"].weight is fresh["model"]["words"].weight
