"""Any source becomes a committed step, which our own loads, torch and the checker take for one that was saved."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import shardckpt as sc
from shardckpt.cli.commands import app
from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointSaveError, InvalidStateError
from shardckpt.storage.base import Buffer
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.tools.moving.foreign.archive_source import ArchiveSource
from shardckpt.tools.moving.foreign.combined import Combined, origins
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window
from shardckpt.tools.moving.step_sink import StepSink
from tests.tools.moving.reading import same
from tests.tools.moving.test_foreign_folders import save_trainer

MIB = 1 << 20


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 7, bias=False, dtype=torch.float32)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.low = torch.nn.Linear(4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize("objects", [False, True])
def test_a_training_file_resumes_as_if_it_had_been_saved(tmp_path: Path, objects: bool) -> None:
    model = Tied()
    streams = sc.RngState()
    saved = {
        "model": model.state_dict(),
        "scheduler": {"last_epoch": 4, "_last_lr": [0.5]},
        "step_nr": 11,
        "rng": streams.state_dict(),
        "ema": [{"decay": 0.5, "shadow": torch.randn(3)}],
    }
    drawn = random.random()
    torch.save(saved, tmp_path / "f.pt")
    root: Any = MemoryObjects() if objects else tmp_path / "run"
    report = sc.convert(tmp_path / "f.pt", root)
    assert (report.kind, report.to, report.step) == ("a file of torch.save", "shardckpt", 11)
    assert report.parts == ("model", "scheduler", "step_nr", "rng", "ema")
    assert report.tensors == len(model.state_dict()) + 2

    class Scheduler:
        loaded: Any = None

        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

    fresh, scheduler = Tied(), Scheduler()
    state = {"model": fresh, "scheduler": scheduler, "step_nr": 0, "rng": streams}
    with sc.CheckpointManager(root) as manager:
        assert manager.resume(state).step == 11
        step, whole = manager.load_last_checkpoint()
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert (scheduler.loaded, state["step_nr"], random.random()) == (saved["scheduler"], 11, drawn)
    assert step == 11
    assert same(whole["ema"], saved["ema"])
    (found,) = sc.verify(root).steps
    assert (found.problems, found.standing) == ((), "committed")


def test_its_files_are_what_torch_reads_and_hold_tied_bytes_once(tmp_path: Path) -> None:
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "f.pt")
    sc.convert(tmp_path / "f.pt", tmp_path / "run", step=3)
    assert sorted(path.name for path in (tmp_path / "run" / "step_3").iterdir()) == ["manifest.json", "model.pt"]
    loaded = torch.load(tmp_path / "run" / "step_3" / "model.pt", mmap=True, weights_only=True)
    assert loaded.pop("model_key") == "model"
    assert same(loaded["model"], dict(model.state_dict()))
    assert loaded["model"]["head.weight"].data_ptr() == loaded["model"]["embed.weight"].data_ptr()


def test_an_optimizer_of_named_parameters_resumes(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, torch.optim.AdamW(reversed([*model.named_parameters()]), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "f.pt")
    sc.convert(tmp_path / "f.pt", tmp_path / "run")
    fresh, resumed = made()
    with sc.CheckpointManager(tmp_path / "run") as manager:
        manager.resume({"model": fresh, "optimizer": resumed})
    for pair in ((model, optimizer), (fresh, resumed)):
        step(*pair)
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))


class Made:
    """A source that makes its bytes when they are read, and notes how much is asked for at once."""

    def __init__(self, **sizes: int) -> None:
        self.tensors = {f"model.{name}": TensorFacts("uint8", (size,)) for name, size in sizes.items()}
        self.ties: dict[str, str] = {}
        self.tree: Any = {"model": {name: TensorName(f"model.{name}") for name in sizes}}
        self.most = 0
        self.passes = 0
        self.add = 0
        self._lock = threading.Lock()

    def read(self, windows: Sequence[Window]) -> None:
        with self._lock:
            self.most = max(self.most, sum(len(window.into) for window in windows))
            self.passes += any(window.start == 0 for window in windows)
        for window in windows:
            window.into[:] = bytes([(len(window.name) + self.add) % 256]) * len(window.into)

    def close(self) -> None: ...


class Drain(StorageWrapper):
    """Takes what is put, and keeps nothing of large objects."""

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        if key.endswith(".pt"):
            return sum(memoryview(part).nbytes for part in parts)
        return self.inner.put(key, parts)


def test_no_more_than_the_budget_is_asked_for_at_once() -> None:
    source = Made(large=48 * MIB, other=30 * MIB, **{f"small{n}": 1000 for n in range(40)})
    StepSink(Drain(MemoryStorage()), step=1).write(source, budget_nbytes=16 * MIB)
    assert 4 * MIB <= source.most <= 8 * MIB


def _left(storage: Any) -> list[str]:
    return [name for name in storage.list() if name.startswith("step_")]


def test_what_changes_between_the_passes_is_no_step() -> None:
    class Changing(Made):
        def read(self, windows: Sequence[Window]) -> None:
            super().read(windows)
            self.add = 1 if self.passes else 0

    storage = MemoryStorage()
    with pytest.raises(CheckpointDamagedError, match=r"model\.w was read twice, and was not the same"):
        StepSink(storage, step=1).write(Changing(w=5000), budget_nbytes=MIB)
    assert _left(storage) == []


@pytest.mark.parametrize("objects", [False, True])
def test_a_source_that_fails_on_the_way_leaves_nothing(objects: bool) -> None:
    class Failing(Made):
        def read(self, windows: Sequence[Window]) -> None:
            super().read(windows)
            if self.passes > 2:
                raise CheckpointLoadError("the network is gone")

    storage = MemoryObjects() if objects else MemoryStorage()
    with pytest.raises(CheckpointLoadError, match="the network is gone"):
        StepSink(storage, step=1).write(Failing(a=5 * MIB, b=MIB, c=MIB), budget_nbytes=8 * MIB)
    assert _left(storage) == []


def test_a_step_that_is_there_stays_as_it_is() -> None:
    storage = MemoryStorage()
    with sc.CheckpointManager(storage) as manager:
        manager.save(1, {"model": {"w": torch.ones(3)}}).result()
    with pytest.raises(CheckpointSaveError, match=r"step 1 is in .* already"):
        StepSink(storage, step=1).write(Made(w=3), budget_nbytes=MIB)
    assert _left(storage) == ["step_1/"]
    with sc.CheckpointManager(storage) as manager:
        assert torch.equal(manager.load_checkpoint(1)["model"]["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "has parts by name"),
        ([1], "has parts by name"),
        ({1: {"a": 2}}, "has parts by name"),
        ({"model_key": "x"}, "no part can have that name"),
        ({"model": {"a.b": 1, "a": {"b": 2}}}, r"both called 'model\.a\.b'"),
        ({"model": {"a": object()}}, r"model\.a: a value of type builtins\.object"),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_says_why(tree: Any, says: str) -> None:
    source, storage = Made(), MemoryStorage()
    source.tree = tree
    with pytest.raises(InvalidStateError, match=says):
        StepSink(storage, step=1).write(source, budget_nbytes=MIB)
    assert _left(storage) == []


def test_ties_hold_across_parts_and_through_renaming(tmp_path: Path) -> None:
    weight = torch.randn(5, 5)
    torch.save({"a": {"w": weight}, "b": [weight.t(), weight]}, tmp_path / "f.pt")
    inner = origins(ArchiveSource(LocalStorage(tmp_path), "f.pt"))
    source = Combined({"model": inner["b"], "ema": inner["a"]})
    assert dict(source.ties) == {"ema.w": "model.1"}
    StepSink(tmp_path / "run", step=0).write(source, budget_nbytes=MIB)
    with sc.CheckpointManager(tmp_path / "run") as manager:
        state = manager.load_checkpoint(0)
    assert same(state, {"model": [weight.t(), weight], "ema": {"w": weight}})


def test_the_command_converts_and_says_what_is_not(tmp_path: Path) -> None:
    save_trainer(tmp_path / "checkpoint-7")
    source, run = str(tmp_path / "checkpoint-7"), str(tmp_path / "run")
    told = CliRunner().invoke(app, ["convert", source, run])
    assert told.exit_code == 0, told.output
    assert "a checkpoint of Trainer: 5 tensors" in told.output
    assert "written as shardckpt, step 7" in told.output
    assert "training_args.bin is not read" in told.output
    told = CliRunner().invoke(app, ["convert", source, run, "--step", "9", "--part", "model", "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert (report["step"], report["parts"], report["tensors"]) == (9, ["model"], 2)
    assert CliRunner().invoke(app, ["convert", source, run, "--step", "9"]).exit_code == 2
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "gone"), run]).exit_code == 1
    assert CliRunner().invoke(app, ["convert", source, run, "--to", "stone"]).exit_code == 2
    (tmp_path / "checkpoint-7" / "scheduler.pt").write_bytes(b"PK nonsense")
    assert CliRunner().invoke(app, ["convert", source, run, "--step", "10"]).exit_code == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_7", "step_9"]
