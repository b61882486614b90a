"""`Trainer` where something is not as it should be: nothing is lost that was saved, and nothing waits for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.integrations.huggingface import pretrained
from shardckpt.integrations.huggingface.places import which_of
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FailingStorage, on
from tests.integrations.forks import Forks
from tests.integrations.huggingface import ends, jobs

pytestmark = pytest.mark.xdist_group("huggingface")


def test_where_the_save_of_the_best_fails_what_was_saved_stays(forks: Forks, tmp_path: Path) -> None:
    (found,) = forks.run(1, ends.the_best_is_not_saved, tmp_path, preload=jobs.PRELOAD)
    assert found == {"limit 1": (True, [2], [2]), "limit 2": (True, [2, 8], [2])}


def test_where_only_the_best_is_to_stay_and_it_is_told_to_stop_the_last_one_stays(forks: Forks, tmp_path: Path) -> None:
    (found,) = forks.run(1, ends.told_to_stop, tmp_path, preload=jobs.PRELOAD)
    assert found == {"steps": ([4, 6], 6, [4]), "best": ([4, 6], 6, [4])}


def test_in_a_place_that_is_not_empty(forks: Forks, tmp_path: Path) -> None:
    """The step of the highest number stays in any place, whatever a policy says."""
    (found,) = forks.run(1, ends.in_a_place_that_is_not_empty, tmp_path, preload=jobs.PRELOAD)
    assert found == {
        "by the name of a copy, the steps elsewhere": 6,
        "of a new training the newest stay": ([3, 4, 8], [3, 4, 8]),
        "a step of an earlier training is not the best of this one": None,
        "what Trainer itself has written, True": (4, [6]),
        "what Trainer itself has written, auto": (4, [6]),
    }


@pytest.mark.parametrize(
    ("text", "which"),
    [
        ("out/checkpoint-500", 500),
        ("./out/checkpoint-500/", 500),
        ("other/checkpoint-500", "other/step_500"),
        ("checkpoint-500", "./step_500"),
        ("s3://lab/run/checkpoint-500", "s3://lab/run/step_500"),
        ("s3://lab/run", "s3://lab/run"),
        ("out/checkpoint-x", "out/checkpoint-x"),
    ],
)
def test_what_is_asked_for(text: str, which: Any) -> None:
    assert which_of(text, here="out") == which


class Copies:
    """A manager, its saves, and what keeps their copies."""

    def __init__(self, folder: Path) -> None:
        self.manager = sc.CheckpointManager(folder / "run")
        self.exporter = pretrained.Exporter(self.manager, folder, model=torch.nn.Linear(2, 2), prefix="checkpoint-")

    def save(self, step: int) -> None:
        self.exporter.follow(self.manager.save(step, {"model": torch.nn.Linear(2, 2), "more": 1}))
        self.manager.wait()

    def close(self) -> None:
        self.manager.close()
        self.exporter.close()


@pytest.fixture
def copies(tmp_path: Path) -> Any:
    made = Copies(tmp_path)
    yield made
    made.close()


def in_time(act: Callable[[], object]) -> bool:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_a_copy_that_fails_in_whatever_way_is_logged_and_the_next_one_is_made(
    copies: Copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such thing was thought of")

    with monkeypatch.context() as patched:
        patched.setattr(pretrained, "export", breaks)
        copies.save(1)
        assert in_time(copies.exporter.wait)
    assert "RuntimeError: no such thing was thought of" in caplog.text
    copies.save(2)
    assert in_time(copies.exporter.wait)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_copy_stays_as_long_as_the_model_of_its_step_does(copies: Copies, tmp_path: Path) -> None:
    copies.save(1)
    copies.save(2)
    copies.manager.delete_checkpoint(1, preserve_model=True)
    copies.manager.delete_checkpoint(2)
    copies.manager.close()  # all is told
    assert in_time(copies.exporter.wait)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_cannot_be_put_beside_the_steps_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Config:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "config.json").write_text("{}")

    model = torch.nn.Linear(2, 2)
    model.config = Config()
    root = FailingStorage(MemoryStorage(), on(key="config.json"), times=None)
    with caplog.at_level(logging.WARNING), sc.CheckpointManager(root) as manager:
        pretrained.put_beside(manager, model)
    assert root.failed
    assert "cc/config.json does not go with the steps" in caplog.text
