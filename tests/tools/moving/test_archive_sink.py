"""One-file `.pt` of any state, judged by `torch.load` and `zipfile`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.errors import CheckpointLoadError, CheckpointSaveError
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.tools.moving.archive_sink import ArchiveSink
from shardckpt.tools.moving.step import StepSource
from tests.engine.states import Net
from tests.tools.moving.reading import same
from tests.tools.moving.test_safetensors_sink import Failing, Swallowing, everything, saved
from tests.tools.moving.test_step_sink import MIB, Made


def write(root: Any, where: Any, part: str | None = "model", **options: Any) -> None:
    with StepSource.open(root, part=part) as source:
        ArchiveSink(where, **options).write(source, budget_nbytes=8 * MIB)


def opened(path: Path) -> Any:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    return torch.load(path, mmap=True, weights_only=True)


def test_a_model_of_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    values = everything() | {"four": torch.randn(3, 2, dtype=torch.complex128), "_extra_state": {"n": 3}}
    saved(tmp_path / "run", values)
    write(tmp_path / "run", tmp_path / "model.pt")
    assert same(opened(tmp_path / "model.pt"), values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "run"]


def test_a_folder_with_what_goes_beside_it_converts_back(tmp_path: Path) -> None:
    model = Net()
    saved(tmp_path / "run", model)
    write(tmp_path / "run", tmp_path / "out", beside={"config.json": b"{}"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "pytorch_model.bin"]
    found = opened(tmp_path / "out/pytorch_model.bin")
    assert same(found, dict(model.state_dict()))
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    sc.convert(tmp_path / "out", tmp_path / "back", step=2)
    with sc.CheckpointManager(tmp_path / "back") as manager:
        assert same(manager.load_checkpoint(2)["model"], found)


def test_a_whole_state_keeps_its_parts(tmp_path: Path) -> None:
    saved(tmp_path / "run", {"w": torch.ones(3)})
    report = sc.convert(tmp_path / "run", tmp_path / "out", to="pt")
    assert (report.to, report.tensors, report.parts) == ("pt", 1, ("model", "progress"))
    assert same(opened(tmp_path / "out/checkpoint.pt"), {"model": {"w": torch.ones(3)}, "progress": {"step": 1}})


def test_what_is_there_stays(tmp_path: Path) -> None:
    saved(tmp_path / "run", {"w": torch.ones(3)})
    write(tmp_path / "run", where := MemoryStorage())
    assert where.list() == ["pytorch_model.bin"]
    (tmp_path / "file.pt").write_text("mine")
    for there in (where, tmp_path / "file.pt"):
        with pytest.raises(CheckpointSaveError, match="is there already"):
            write(tmp_path / "run", there)
    assert (tmp_path / "file.pt").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out.pt", "objects"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, name: str) -> None:
    where: Any = MemoryObjects() if name == "objects" else tmp_path / name
    with pytest.raises(CheckpointLoadError, match="the network is gone"):
        ArchiveSink(where).write(Failing(a=5 * MIB, b=3 * MIB, c=3 * MIB), budget_nbytes=8 * MIB)
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(where, MemoryObjects) or where.list() == []


def test_no_more_than_the_budget_is_asked_for_at_once() -> None:
    source = Made(large=48 * MIB, other=30 * MIB, **{f"small{n}": 1000 for n in range(40)})
    ArchiveSink(Swallowing(MemoryStorage())).write(source, budget_nbytes=16 * MIB)
    assert 4 * MIB <= source.most <= 8 * MIB
