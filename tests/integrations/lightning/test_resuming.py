"""Lightning, killed in the middle and started again with `ckpt_path`: the same losses as without, bit for bit.

All layouts, places and moments: `python -m pytest tests/integrations/lightning --scale full`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.forks import Forks
from tests.integrations.lightning.plans import EPOCH, Layout, Plan, Result, train
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

pytestmark = pytest.mark.xdist_group("lightning")

PRELOAD = ["tests.integrations.lightning.training", "s3fs", "aiobotocore.session"]
RANKS: dict[Layout, int] = {"one": 1, "ddp": 2, "fsdp2": 2, "tp": 2}
WHEN: dict[str, dict[str, Any]] = {
    "in an epoch": {"every_n_train_steps": 3},
    "after an epoch": {"every_n_epochs": 1},
    "in steps": {"every_n_train_steps": 3, "trainer": {"max_steps": 20, "max_epochs": -1}},
}
SAMPLE = [("one", "file", "in an epoch"), ("ddp", "file", "after an epoch"), ("fsdp2", "s3", "in an epoch")]
EVERY = list(product(RANKS, ("file", "s3"), WHEN))


def run(forks: Forks, plan: Plan) -> list[Result]:
    return forks.run(RANKS[plan.layout], train, plan, preload=PRELOAD)


def epoch_of(layout: Layout) -> int:
    return EPOCH if layout in ("ddp", "fsdp2") else 2 * EPOCH


def plan_of(root: str, layout: Layout, when: str) -> Plan:
    saved = dict(WHEN[when])
    return Plan(root, layout, trainer=saved.pop("trainer", {}), saved=saved)


def same_after(before: Result, after: Result, *, between: tuple[int, int]) -> None:
    first = min(after.losses)
    assert between[0] <= first <= between[1], "it was resumed"
    assert after.losses == {step: loss for step, loss in before.losses.items() if step >= first}
    assert all(bool((after.state[name] == before.state[name]).all()) for name in before.state)
    assert after.seen["mine"] is not None, "what a hook of the module's has saved comes back to it"


@pytest.fixture
def root_of(
    tmp_path: Path, s3: S3Server, place: Callable[[S3Server], str]
) -> Callable[[str], tuple[str, dict[str, str]]]:
    """A place of that kind, and the environment that leads there."""
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    environ = {"AWS_ENDPOINT_URL_S3": s3.endpoint, **keys}
    return lambda kind: (str(tmp_path / "run"), {}) if kind == "file" else (place(s3), environ)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "when" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--scale").runs(sample=0, full=2) > 1
        metafunc.parametrize(("layout", "where", "when"), EVERY if everything else SAMPLE, ids=str)


@pytest.mark.s3
@pytest.mark.sampled(2)
def test_killed_and_resumed(forks: Forks, tmp_path: Path, root_of: Any, layout: Layout, where: str, when: str) -> None:
    root, environ = root_of(where)
    whole = run(forks, plan_of(str(tmp_path / "whole"), layout, when))
    plan = plan_of(root, layout, when).but(environ=environ)
    epoch = epoch_of(layout)
    kill_at, first_save = (2 * epoch + 1, epoch) if when == "after an epoch" else (epoch + 3, 3)
    ended = forks.run_settled(RANKS[layout], train, plan.but(kill_at=kill_at), preload=PRELOAD)
    assert [one.killed for one in ended] == [signal.SIGKILL] * len(ended), ended
    for before, after in zip(whole, run(forks, plan.but(ckpt_path="last")), strict=True):
        same_after(before, after, between=(first_save, kill_at))
