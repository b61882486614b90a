"""`latest` and `best`: where they lead, that they are swept, and that what is no link of ours stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.run.keeping.links import update_links
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from tests.run.making import commit

STATE = {"w": torch.ones(2)}


def lead(root: Path) -> list[str | None]:
    return [os.readlink(root / name) if (root / name).is_symlink() else None for name in ("latest", "best")]


def manager(root: Any, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(root, sc.Gangs.local(), **options)


def test_links_follow_saves_scores_and_deletions(tmp_path: Path) -> None:
    keep = sc.KeepLast(2) | sc.KeepBest(1, lower_better=True)
    with manager(tmp_path, keep=keep) as checkpoints:
        checkpoints.keep_links()
        assert lead(tmp_path) == [None, None]
        for step, score in ((1, 0.5), (2, 0.1), (3, 0.9), (4, 0.8)):
            checkpoints.save(step, STATE)
            checkpoints.save_score(score, step=step)
    assert lead(tmp_path) == ["step_4", "step_2"]
    assert (tmp_path / "best/manifest.json").exists()
    with manager(tmp_path, keep=keep) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4]
        checkpoints.keep_links()
        checkpoints.save_score(0.0, step=3)
        assert lead(tmp_path) == ["step_4", "step_3"]
        checkpoints.delete_checkpoint(4)
        checkpoints.delete_checkpoint(3)
        assert lead(tmp_path) == ["step_2", "step_2"]
        checkpoints.delete_checkpoint(2)
        assert lead(tmp_path) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_links_do_not_lead_to_steps_that_were_set_aside(tmp_path: Path) -> None:
    with manager(tmp_path) as checkpoints:
        checkpoints.keep_links()
        checkpoints.save(1, STATE).result()
        checkpoints.resume(dict(STATE), False, overwrite="set aside")
        assert lead(tmp_path) == [None, None]


def test_a_run_that_was_moved_has_links_that_lead(tmp_path: Path) -> None:
    with manager(tmp_path / "a") as checkpoints:
        checkpoints.keep_links()
        checkpoints.save(1, STATE)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/latest").resolve() == tmp_path / "b/step_1"
    with manager(tmp_path / "b") as checkpoints:
        assert checkpoints.steps() == [1]


def test_links_decide_nothing_and_are_not_followed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for step in (1, 2):
        commit(storage, step)
    (tmp_path / "latest").symlink_to("step_1")
    (tmp_path / "step_9").symlink_to("step_1")
    catalog = Catalog(storage)
    assert catalog.steps() == [1, 2]
    update_links(catalog, best=7)
    assert lead(tmp_path) == ["step_2", None]


def test_stale_links_go_and_what_is_none_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = LocalStorage(tmp_path)
    commit(storage, 1)
    (tmp_path / f"latest.{'0' * 16}.tmp").symlink_to("step_7")
    (tmp_path / f"best.{'1' * 16}.tmp").write_text("mine")
    (tmp_path / "best").symlink_to("step_7")
    (tmp_path / "latest").mkdir()
    update_links(Catalog(storage), best=None)
    assert "not up to date" in caplog.text
    assert (tmp_path / "latest").is_dir()
    assert not (tmp_path / f"latest.{'0' * 16}.tmp").is_symlink()
    assert (tmp_path / f"best.{'1' * 16}.tmp").read_text() == "mine"
    (tmp_path / "latest").rmdir()
    update_links(Catalog(storage), best=None)
    assert lead(tmp_path) == ["step_1", None]


def test_where_there_are_no_links_nothing_is_done() -> None:
    place = MemoryStorage()
    with manager(place) as checkpoints:
        checkpoints.keep_links()
        checkpoints.save(1, STATE)
    assert place.list() == ["step_1/"]
