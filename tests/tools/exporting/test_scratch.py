"""What a killed export leaves behind goes with the next one of that name, and nothing else does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.exporting.scratch import Scratch, sweep


def export_and_die(rank: int, world_size: int, folder: Path, run: Path, to: Path, form: Any) -> None:
    def told(step: int, nbytes: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    sc.export(run, to, form=form, means=sc.Means(told=told))


@pytest.mark.parametrize(("form", "name"), [("safetensors", "out"), ("pt", "out.pt")])
def test_the_next_export_removes_what_a_killed_one_left(ranks: Any, tmp_path: Path, form: Any, name: str) -> None:
    with sc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"model": {"w": torch.ones(1000)}}).result()
    (killed,) = ranks.run_settled(1, export_and_die, tmp_path / "run", tmp_path / name, form)
    assert "killed by signal 9" in str(killed.error)
    (left,) = (path.name for path in tmp_path.glob(f"{name}.*.tmp"))
    sc.export(tmp_path / "run", tmp_path / "another", form=form)
    assert left in os.listdir(tmp_path), "it is of another name"
    sc.export(tmp_path / "run", tmp_path / name, form=form)
    assert sorted(os.listdir(tmp_path)) == ["another", name, "run"]


def test_what_is_alive_stays_and_so_does_what_looks_like_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    alive, others = Scratch(storage, "out"), Scratch(storage, "out.b")
    anothers = "out." + "0" * 16 + ".tmp"  # of another machine
    stay = [alive.folder, others.folder, anothers, f"{alive.folder}.b", f"a{alive.folder}", "out.tmp", "out"]
    for name in stay[2:]:
        storage.make_folder(name)
    file = alive.folder[:-5] + ("0" if alive.folder[-5] != "0" else "1") + ".tmp"
    (tmp_path / file).write_text("a file")
    others.let_go()
    assert sweep(storage, "out") == []
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, file])
    alive.let_go()
    assert sweep(storage, "out") == [alive.folder]
    assert sweep(storage, "out.b") == [others.folder]
    assert sorted(os.listdir(tmp_path)) == sorted([*stay[2:], file])
