"""Checkpoints of others, and old ones, get the parts that they lack, by choice; and are averaged as they are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardckpt as sc
from shardckpt.errors import CheckpointNotFoundError, InvalidStateError
from shardckpt.run.catalog import Catalog
from shardckpt.storage.local import LocalStorage
from shardckpt.streams import seeded_streams
from tests.cli.test_listing import run


def training() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "rng": sc.RngState()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """What a script wrote: the model and its epoch, and no more."""
    torch.manual_seed(3)
    torch.save({"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 4}, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def test_a_foreign_checkpoint_becomes_one_that_a_job_goes_on_from(old: Path, tmp_path: Path) -> None:
    donor = training()
    with sc.CheckpointManager(tmp_path / "donor") as checkpoints:
        checkpoints.save(9, donor).result()
    run_ = tmp_path / "run"
    add = ("--add", f"optimizer={tmp_path / 'donor'}", "--add", "rng=seed:7")
    status, told, said = run("convert", old, run_, "--step", 5, *add)
    assert (status, told.partition("written as ")[2]) == (0, "shardckpt, step 5")
    assert said.splitlines() == [
        "optimizer was added, from a step of shardckpt, step 9",
        "rng was added, from a state that was given",
    ]
    (step,) = sc.verify(run_).steps
    assert (step.verdict, step.parts["config"]) == ("COMPLETE", False)
    assert set(Catalog(LocalStorage(run_)).record(5)[1].metadata["added"]) == {"optimizer", "rng"}
    state = training()
    with sc.CheckpointManager(run_) as checkpoints:
        assert checkpoints.resume(state).step == 5
    wanted = torch.load(old)["model"]
    assert all(torch.equal(value, wanted[name]) for name, value in state["model"].state_dict().items())
    moments = [s.state_dict()["state"][0]["exp_avg"] for s in (state["optimizer"], donor["optimizer"])]
    assert torch.equal(*moments)
    drawn = (random.random(), float(np.random.rand()), torch.rand(1).item())
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == (random.random(), float(np.random.rand()), torch.rand(1).item())


def test_an_old_step_of_ours_gets_its_random_states(tmp_path: Path) -> None:
    state = training()
    with sc.CheckpointManager(tmp_path / "old") as checkpoints:
        checkpoints.save(3, {part: state[part] for part in ("model", "optimizer")}).result()
    assert sc.verify(tmp_path / "old").steps[0].verdict == "PARTIAL"
    report = sc.convert(tmp_path / "old", tmp_path / "new", add={"rng": sc.RngState()})
    assert (report.step, report.parts) == (3, ("model", "optimizer", "rng"))
    assert sc.verify(tmp_path / "new").steps[0].verdict == "COMPLETE"
    fresh = training()
    with sc.CheckpointManager(tmp_path / "new") as checkpoints:
        assert checkpoints.resume(fresh).step == 3
    assert torch.equal(fresh["model"].weight, state["model"].weight)


def test_what_is_there_is_not_replaced_and_nonsense_is_refused(old: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidStateError, match="'model' is in the checkpoint already"):
        sc.convert(old, tmp_path / "run", add={"model": {}})
    with pytest.raises(InvalidStateError, match="no state"):
        sc.convert(old, tmp_path / "run", add={"rng": 7})
    with pytest.raises(CheckpointNotFoundError, match="not optimizer"):
        sc.convert(old, tmp_path / "run", add={"optimizer": old})
    for wrong in ("rng", "rng=", "rng=seed:x", "model=seed:1"):
        assert run("convert", old, tmp_path / "run", "--add", wrong)[0] == 2
    assert not (tmp_path / "run").exists()


def test_seeded_streams_leave_those_of_the_process_alone() -> None:
    before = sc.RngState().state_dict()
    streams = seeded_streams(5)
    after = sc.RngState().state_dict()
    assert (before["python"], before["numpy"]) == (after["python"], after["numpy"])
    assert torch.equal(before["torch"], after["torch"])
    assert streams.keys() >= {"python", "numpy", "torch"}


def test_foreign_checkpoints_are_averaged(tmp_path: Path) -> None:
    """A step of ours, a file of `torch.save`, a folder of safetensors."""
    values = [torch.full((3,), number) for number in (1.0, 2.0, 6.0)]
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"model": {"w": values[0]}}).result()
    torch.save({"w": values[1]}, tmp_path / "b.pt")
    (tmp_path / "c").mkdir()
    save_file({"w": values[2]}, tmp_path / "c/model.safetensors")
    sources = [tmp_path / "run", tmp_path / "b.pt", tmp_path / "c"]
    report = sc.average(sources, tmp_path / "mean", step=2)
    assert (report.step, report.sources[1:]) == (2, tuple(map(str, sources[1:])))
    with sc.CheckpointManager(tmp_path / "mean") as checkpoints:
        assert checkpoints.load_checkpoint(2)["model"]["w"].tolist() == [3.0] * 3
    assert run("average", *sources, tmp_path / "out", "--form", "safetensors")[0] == 0
    with pytest.raises(CheckpointNotFoundError, match="there is nothing at"):
        sc.average([tmp_path / "run", tmp_path / "none"], tmp_path / "x")
