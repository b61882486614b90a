"""torchtitan's parts, killed in the middle and started again: the same losses as without; the checkpointer's duties.

All layouts and places: `python -m pytest tests/integrations/titan --scale full`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from tests.integrations.forks import Forks
from tests.integrations.titan.plans import Layout, Plan, Result, train
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

pytestmark = pytest.mark.xdist_group("titan")

PRELOAD = ["tests.integrations.titan.training", "s3fs", "aiobotocore.session"]
RANKS: dict[Layout, int] = {"one": 1, "parts": 1, "fsdp2": 2}
SAMPLE = [("parts", "s3"), ("fsdp2", "file")]
EVERY = list(product(RANKS, ("file", "s3")))


def run(forks: Forks, plan: Plan) -> list[Result]:
    return forks.run(RANKS[plan.layout], train, plan, preload=PRELOAD)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "where" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--scale").runs(sample=0, full=2) > 1
        metafunc.parametrize(("layout", "where"), EVERY if everything else SAMPLE, ids=str)


@pytest.mark.s3
@pytest.mark.sampled(2)
def test_killed_and_resumed(
    forks: Forks, tmp_path: Path, s3: S3Server, place: Callable[[S3Server], str], layout: Layout, where: str
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    root, environ = (str(tmp_path / "run"), {}) if where == "file" else (place(s3), keys)
    plan = Plan(root, layout, environ={**environ, "AWS_ENDPOINT_URL_S3": s3.endpoint})
    whole = run(forks, plan.but(folder=str(tmp_path / "whole")))
    ended = forks.run_settled(RANKS[layout], train, plan.but(kill_at=8), preload=PRELOAD)
    assert [one.killed for one in ended] == [signal.SIGKILL] * len(ended), ended
    for before, after in zip(whole, run(forks, plan), strict=True):
        assert (before.loaded, after.loaded) == (False, True)
        first = min(after.losses)
        assert first in (4, 7), "it was resumed"
        assert after.losses == {step: loss for step, loss in before.losses.items() if step >= first}
        assert all(torch.equal(after.model[name], before.model[name]) for name in before.model)


def test_parts_of_one_rank_load_as_shards_of_two_and_back(forks: Forks, tmp_path: Path) -> None:
    config = {"exclude_from_loading": ["dataloader"]}
    (before,) = run(forks, Plan(str(tmp_path), "parts", steps=3))
    for layout in ("fsdp2", "one"):
        for after in run(forks, Plan(str(tmp_path), layout, steps=3, config=config)):
            assert after.loaded
            assert not after.losses, "the last step had been made"
            assert all(torch.equal(after.model[name], before.model[name]) for name in before.model)


def test_the_last_save_is_the_model_and_safetensors(forks: Forks, tmp_path: Path) -> None:
    last = {"last_save_model_only": True, "last_save_in_hf": True, "export_dtype": "bfloat16"}
    result = run(forks, Plan(str(tmp_path), "fsdp2", config=last))[0]
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as checkpoints:
        assert checkpoints.steps() == [9, 10], "keep_latest_k"
    hub = load_file(tmp_path / "step_10_hf" / "model.safetensors")
    assert hub.keys() == result.hub.keys()
    assert all(torch.equal(hub[name], value.to(torch.bfloat16)) for name, value in result.hub.items())
    assert not list(tmp_path.glob("*_shards/*"))
    resumed = run(forks, Plan(str(tmp_path), "fsdp2", config=last))
    assert [list(one.losses) for one in resumed] == [[10], [10]], "a step of the model alone is passed over"
    assert (tmp_path / "step_10_hf_2" / "model.safetensors").exists(), "what is exported is never replaced"
    initial = {"initial_load_in_hf": True, "initial_load_path": str(tmp_path / "step_10_hf")}
    for layout in ("fsdp2", "one"):
        for begun in run(forks, Plan(str(tmp_path / layout), layout, steps=0, config=initial)):
            assert begun.loaded
            assert all(torch.equal(begun.hub[name], hub[name].float()) for name in hub)


def test_theirs_and_ours_take_the_same_place(forks: Forks, tmp_path: Path) -> None:
    """The same program with torchtitan's own checkpointer; and a start from another run, and optimizers in backward."""
    plan = Plan(str(tmp_path / "ours"), "fsdp2", steps=4)
    theirs = run(forks, plan.but(folder=str(tmp_path / "theirs"), theirs=True))
    assert [one.losses for one in theirs] == [one.losses for one in run(forks, plan)]
    from_step = {"initial_load_path": str(tmp_path / "ours" / "step_3"), "initial_load_model_only": False}
    again = plan.but(folder=str(tmp_path / "new"), config=from_step)
    assert [one.losses for one in run(forks, again)] == [{4: one.losses[4]} for one in theirs]


def test_optimizers_that_step_in_backward(forks: Forks, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path / "whole"), in_backward=True, steps=5)
    (whole,) = run(forks, plan)
    run(forks, plan.but(folder=str(tmp_path / "cut"), steps=3))
    (after,) = run(forks, plan.but(folder=str(tmp_path / "cut")))
    assert after.losses == {step: loss for step, loss in whole.losses.items() if step > 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"async_mode": "sometimes"}, "async_mode is one of"),
        ({"exclude_from_loading": ["model"]}, "cannot be excluded"),
        ({"last_save_in_hf": True, "last_save_model_only": False}, "for the model alone"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    from shardckpt.integrations.titan import CheckpointConfig, Checkpointer

    with pytest.raises(ValueError, match=message):
        Checkpointer(config=CheckpointConfig(folder=str(tmp_path), **wrong), model_parts=[torch.nn.Linear(1, 1)])
