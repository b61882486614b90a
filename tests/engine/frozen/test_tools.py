"""What is done to committed steps is done to those with a shared base: copied, looked at, read as whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects
from shardckpt.testing.faults import FailingStorage, RecordingStorage, on
from shardckpt.tools.contents import files_below
from shardckpt.tools.copying.steps import copy_steps
from shardckpt.tools.looking.inspect import inspect
from shardckpt.tools.moving.seam import Window
from shardckpt.tools.moving.step import StepSource
from tests.engine.frozen.lora import content, same, tune, tuning


@pytest.fixture(params=["files", "objects"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Two steps that share a base."""
    storage: Storage = LocalStorage(tmp_path / "run") if request.param == "files" else MemoryObjects("run")
    state = tuning(width=32)
    with sc.CheckpointManager(storage) as checkpoints:
        for step in (1, 2):
            tune(state)
            checkpoints.save(step, state, frozen=("*",)).result()
    return storage


def blobs(storage: Storage) -> list[str]:
    return [name for name in files_below(storage, "blobs") if name.endswith(".pt")]


@pytest.mark.parametrize("to", ["files", "objects"])
def test_copies_share_the_base_as_well(run: Storage, tmp_path: Path, to: str) -> None:
    target: Storage = LocalStorage(tmp_path / "copy") if to == "files" else MemoryObjects("copy")
    report = copy_steps(run, target, every=True)
    assert [step.outcome for step in report.steps] == ["copied", "copied"]
    assert len(blobs(target)) == len(blobs(run)) == 1
    assert sc.verify(target).ok
    states = [tuning(seed=5, width=32) for _ in range(2)]
    for storage, state in zip((run, target), states, strict=True):
        with sc.CheckpointManager(storage) as checkpoints:
            checkpoints.load(2, state)
    assert same(content(states[0]), content(states[1]))
    assert {step.outcome for step in copy_steps(run, target, every=True).steps} == {"already there"}


def test_a_base_that_is_damaged_is_not_copied(run: Storage, tmp_path: Path) -> None:
    (name,) = blobs(run)
    whole = run.read(f"blobs/{name}")
    run.delete([f"blobs/{name}"])
    run.put(f"blobs/{name}", [whole[:-200], b"x", whole[-199:]])
    target = LocalStorage(tmp_path / "copy")
    assert {step.outcome for step in copy_steps(run, target, every=True).steps} == {"damaged"}
    assert Catalog(target).steps() == []
    assert blobs(target) == []


def test_it_is_looked_at_and_read_as_whole_tensors(run: Storage) -> None:
    told = inspect(run, step=2)
    assert {tensor.name for tensor in told.tensors} > {"model.embed.weight", "model.layers.0.lora_a"}
    state = tuning(seed=5, width=32)
    with sc.CheckpointManager(run) as checkpoints:
        checkpoints.load(2, state)
    entry = Catalog(run).entry(2)
    folder, manifest = Catalog(run).record(entry)
    source = StepSource(run, folder, manifest)
    try:
        facts = source.tensors["model.layers.0.base.weight"]
        read = torch.empty(facts.shape)
        source.read([Window("model.layers.0.base.weight", 0, memoryview(read.numpy()).cast("B"))])
    finally:
        source.close()
    assert torch.equal(read, state["model"].layers[0].base.weight)


@pytest.mark.parametrize("to", ["files", "objects"])
def test_a_copy_that_fails_anywhere_is_gone_on_with(run: Storage, tmp_path: Path, to: str) -> None:
    def place(name: str) -> Storage:
        return LocalStorage(tmp_path / name) if to == "files" else MemoryObjects(name)

    changes = ("put", "make_folder", "rename_folder", "sync_folder", "delete")
    reference = RecordingStorage(place("reference"))
    copy_steps(run, reference)
    for nth in range(1, sum(operation.name in changes for operation in reference.operations) + 1):
        target = place(f"copy {nth}")
        with pytest.raises(sc.CheckpointSaveError, match="the same command goes on"):
            copy_steps(run, FailingStorage(target, on(*changes), nth=nth))
        assert not Catalog(target).steps() or sc.verify(target).ok
        assert copy_steps(run, target).ok
        assert sc.verify(target).ok
