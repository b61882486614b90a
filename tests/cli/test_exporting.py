"""`export` and `average`: what they print and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from shardckpt.cli.doing.exporting import size_of
from tests.cli.test_listing import run
from tests.tools.making import save


def test_a_model_goes_out(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 7)
    (tmp_path / "run/cc").mkdir()
    assert run("export", tmp_path / "run", tmp_path / "a") == (0, "step 7: 2 tensors, 72 B, written as safetensors", "")
    told = run("export", tmp_path / "run", tmp_path / "b", "--step", 1, "--max-file-size", "50B")
    assert told == (0, "step 1: 2 tensors, 72 B, written as safetensors", "")
    assert len(list((tmp_path / "b").iterdir())) == 3
    assert load_file(tmp_path / "b/model-00001-of-00002.safetensors")["weight"].tolist() == [[1] * 3] * 2
    arguments = ("--form", "pt", "--part", "optimizer", "--dtype", "bfloat16", "--json")
    status, told, _ = run("export", tmp_path / "run", tmp_path / "c.pt", *arguments)
    report = json.loads(told)
    assert (status, report["tensors"], report["nbytes"], report["form"], report["copied"]) == (0, 1, 12, "pt", [])
    assert torch.load(tmp_path / "c.pt")["optimizer"]["momentum"].dtype == torch.bfloat16


def test_how_it_ends(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    assert run("export", tmp_path / "none", tmp_path / "a")[0] == 1
    assert run("export", tmp_path / "run", tmp_path / "a", "--step", 9)[0] == 1
    assert run("export", tmp_path / "run", tmp_path / "a", "--form", "stone")[0] == 2
    assert run("export", tmp_path / "run", tmp_path / "a", "--max-file-size", "many")[0] == 2
    status, told, said = run("export", tmp_path / "run", tmp_path / "run")
    assert (status, told, "is there already" in said) == (2, "", True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_average_of_two(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            manager.save(step, {"model": {"w": torch.full((3,), float(step))}}).result()
    steps = [tmp_path / "run/step_1", tmp_path / "run/step_2"]
    told = f"1 tensor, 12 B, written as shardckpt, step 2\n 25.00%  {steps[0]}\n 75.00%  {steps[1]}"
    assert run("average", *steps, tmp_path / "new", "--weights", "1,3") == (0, told, "")
    to = tmp_path / "a.safetensors"
    status, told, _ = run("average", *steps, to, "--decay", 0.5, "--form", "safetensors", "--json")
    assert (status, json.loads(told)["weights"]) == (0, [0.5, 0.5])
    assert load_file(to)["w"].tolist() == [1.5] * 3
    assert run("average", *steps, tmp_path / "new", "--step", 3)[0] == 0
    assert run("ls", tmp_path / "new")[0] == 0
    for wrong in (("--weights", "1,x"), ("--weights", "1"), ("--form", "stone"), ("--step", 2)):
        assert run("average", *steps, tmp_path / "new", *wrong)[0] == 2
    assert run("average", *steps, tmp_path / "run/step_7", tmp_path / "new")[0] == 1


@pytest.mark.parametrize(("text", "nbytes"), [("12", 12), ("5GB", 5 * 10**9), ("1.5 kib", 1536), ("2m", 2 * 10**6)])
def test_sizes(text: str, nbytes: int) -> None:
    assert size_of(text) == nbytes


@pytest.mark.slow
@pytest.mark.larger
@pytest.mark.timeout(300)
def test_processes_that_torchrun_starts_do_it_together(tmp_path: Path) -> None:
    """One of them says so; none of them finds the place taken by another."""
    save(tmp_path / "run", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "shardckpt", "export", str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, timeout=250, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "step 1: 2 tensors, 72 B, written as safetensors"
    assert load_file(tmp_path / "out/model.safetensors")["weight"].tolist() == [[1] * 3] * 2
