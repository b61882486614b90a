"""Lightning where something is not as it should be: a damaged step, ranks that differ, a metric that is not there."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.lightning.edges import fails_on_an_older_lightning, train_with
from tests.integrations.lightning.plans import EPOCH, Plan
from tests.integrations.lightning.test_callback import steps_of
from tests.integrations.lightning.test_resuming import PRELOAD, run

pytestmark = pytest.mark.xdist_group("lightning")


def test_last_means_the_newest_step_that_is_good(forks: Forks, tmp_path: Path) -> None:
    epoch = 2 * EPOCH
    plan = Plan(str(tmp_path), saved={"every_n_epochs": 1, "save_top_k": -1}, epochs=2, plain_loader=True)
    run(forks, plan)
    for file in (tmp_path / f"step_{2 * epoch}").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:-300] + bytes(300))
    (after,) = run(forks, plan.but(ckpt_path="last"))
    assert list(after.losses) == list(range(epoch, 2 * epoch))


def test_what_ranks_log_may_differ_and_the_best_is_that_of_rank_0(forks: Forks, tmp_path: Path) -> None:
    terms = {"timeout": timedelta(seconds=20)}
    plan = Plan(str(tmp_path), "ddp", {"monitor": "own", "save_top_k": 1}, epochs=2, terms=terms)
    found = forks.run(2, train_with, plan, "uneven", preload=PRELOAD)
    assert found == 2 * [{"ended": "well", "best": "step_2", "k": [1.0]}]


def test_a_metric_that_nobody_logs_is_an_error_and_the_step_is_there(forks: Forks, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), saved={"monitor": "vla"}, epochs=2)
    (found,) = forks.run(1, train_with, plan, "plain", preload=PRELOAD)
    assert found["ended"].startswith("MisconfigurationException: monitor='vla', but no such metric was logged: ['val']")
    assert steps_of(tmp_path) == [4]


def test_a_training_that_is_shorter_than_the_interval_has_its_last_step(forks: Forks, tmp_path: Path) -> None:
    saved = {"every_n_epochs": 100, "save_last": True}
    (found,) = forks.run(1, train_with, Plan(str(tmp_path), saved=saved, epochs=2), "plain", preload=PRELOAD)
    assert (found["ended"], steps_of(tmp_path)) == ("well", [8])


def test_a_rank_that_fails_does_not_wait_for_the_others(forks: Forks, tmp_path: Path) -> None:
    """Longer than for a last save, which needs them all."""
    saved = {"save_on_exception": True, "every_n_train_steps": 100}
    plan = Plan(str(tmp_path), "ddp", saved, epochs=2, terms={"timeout": timedelta(minutes=10)})
    _, last = forks.run_settled(2, train_with, plan, "fails", preload=PRELOAD, timeout=60)
    assert "KeyError: 'its own'" in last.trace, last


def test_with_lightning_2_5_a_failure_is_the_one_that_was(forks: Forks, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), saved={"every_n_train_steps": 1})
    (found,) = forks.run(1, fails_on_an_older_lightning, plan, preload=PRELOAD)
    assert (found["ended"], found["theirs"]) == ("KeyError: 'its own'", {"theirs": 1})
