"""`inspect` and `plan`: what they print, as it stands on 80 columns and as data, and how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import shardckpt.cli.looking.inspecting
import shardckpt.cli.looking.planning
from tests.cli.test_listing import run
from tests.manager.transactions import Size
from tests.tools.making import save, save_on

ONE = """\
step 7, 2.65 kB in 2 files, by 1 rank (data=1, model=1)
  <when>; <versions>
tensor              dtype    shape  placement  size
model.weight        int64    2x3    -          48 B
model.bias          int64    3      -          24 B
optimizer.momentum  float32  2x3    -          24 B
3 tensors, 96 B; 1 value: rng.seed"""

TREE = """\
module      tensors  size
model             2  72 B
  weight          1  48 B
  bias            1  24 B
optimizer         1  24 B
  momentum        1  24 B
3 tensors, 96 B; 1 value: rng.seed"""

FILES = """\
step 3, 9.92 kB in 6 files, by 4 ranks (data=2, model=2)
  <when>; <versions>
file        kind   rank     size  tensors  of tensors
model.0.pt  model     0  1.75 kB        3        62 B
model.1.pt  model     1  1.75 kB        3        62 B
rank_0.pt   rank      0   1.6 kB        2        52 B
rank_1.pt   rank      1   1.6 kB        2        52 B
rank_2.pt   rank      2   1.6 kB        2        52 B
rank_3.pt   rank      3   1.6 kB        2        52 B
rank 0 (shard 0) wrote 2 files, 3.35 kB
rank 1 (shard 1) wrote 2 files, 3.36 kB
rank 2 (shard 0) wrote 1 file, 1.6 kB
rank 3 (shard 1) wrote 1 file, 1.6 kB
5 tensors, 114 B; 1 value: epoch"""

PLAN = """\
step 7, 2.65 kB, on 3 ranks (dp=3)
rank  reads  ranges  from
   0   44 B       3  model.pt, rank_0.pt
   1   44 B       3  model.pt, rank_0.pt
   2    8 B       1  model.pt
96 B of tensors in all, and <bytes> of indexes and nestings
left out: 1 key of 4"""


TENSORS = [("model.pt", 2), ("rank_0.pt", 1)]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal that people have."""

    def console() -> Console:
        return Console(width=80, highlight=False, emoji=False, markup=False)

    for module in (shardckpt.cli.looking.inspecting, shardckpt.cli.looking.planning):
        monkeypatch.setattr(module, "console", console)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"
    save(url, 7)
    return url


def steady(text: str) -> str:
    """Without what is other each time."""
    text = re.sub(r"  \d{4}-\S+ \d\d:\d\d UTC; .*python [\d.]+", "  <when>; <versions>", text)
    return re.sub(r"and [\d.]+ k?B of indexes", "and <bytes> of indexes", text)


def test_inspect(url: str) -> None:
    status, told, said = run("inspect", url)
    assert (status, steady(told), said) == (0, ONE, "")
    assert run("inspect", f"{url}/step_7", "--step", 7)[1] == told
    assert run("inspect", url, "--tree")[1].partition("\n")[2].partition("\n")[2] == TREE
    shallow = run("inspect", url, "--tree", "--depth", 0, "-f", "model")[1].splitlines()
    assert shallow[2:] == ["module  tensors  size", "model         2  72 B", "2 tensors, 72 B"]


def test_inspect_as_data(url: str) -> None:
    status, told, _ = run("inspect", url, "--json", "--filter", "*.weight", "--filter", "rng")
    found = json.loads(told)
    assert (status, found["step"], found["tensor_nbytes"], found["values"]) == (0, 7, 48, ["rng.seed"])
    (tensor,) = found["tensors"]
    assert tensor == {
        "name": "model.weight",
        "dtype": "int64",
        "shape": [2, 3],
        "nbytes": 48,
        "placement": "-",
        "home": "model",
        "ranks": 1,
        "tied_to": None,
    }
    prefix = f"{found['attempt']}/" if url.startswith("memory") else ""
    files = [(file["name"], file["tensors"]) for file in found["files"]]
    assert files == [(re.sub("[0-9a-f]{20}", "<id>", f"{prefix}{name}"), n) for name, n in TENSORS]
    assert found["ranks"] == [{"rank": 0, "shard": 0, "files": 2, "nbytes": found["nbytes"]}]


def test_inspect_files_of_ranks(tmp_path: Path) -> None:
    save_on(Size(2, 2), tmp_path, 3)
    status, told, said = run("inspect", tmp_path, "--files", "-f", "model", "-f", "epoch", "-f", "optimizer.state")
    assert (status, steady(told), said) == (0, FILES, "")
    (tmp_path / "step_3/rank_2.pt").unlink()
    status, told, said = run("inspect", tmp_path, "--files")
    assert (status, "rank_2.pt   rank      2   1.6 kB        -           -" in told) == (1, True)
    assert said == "rank_2.pt: it is missing, or shorter than it was; `shardckpt verify` says more"


def test_plan(url: str) -> None:
    status, told, said = run("plan", url, "--mesh", "dp=3", "--exclude", "rng")
    assert (status, steady(told), said) == (0, PLAN, "")
    status, told, _ = run("plan", url, "--mesh", "dp=3", "--exclude", "rng", "--json")
    found = json.loads(told)
    assert (status, found["mesh"], found["nbytes"], found["plan"]["dropped"]) == (0, {"dp": 3}, 96, ["rng.seed"])
    (file, *_) = found["plan"]["ranks"][2]["files"]
    assert (file["file"].rpartition("/")[2], file["ranges"], file["nbytes"]) == ("model.pt", 1, 8)
    status, told, said = run("plan", url)  # on the mesh on which it was saved
    assert (status, told.splitlines()[0], said) == (0, "step 7, 2.65 kB, on 1 rank (dp=1)", "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["inspect", "--step", "8"], 1, "no committed checkpoint of step 8"),
        (["inspect", "-f", "none.*"], 1, "nothing in step 7 matches none.*"),
        (["plan", "--mesh", "dp=2", "--include", "none.*"], 1, "include: 'none.*' matches no key of the step"),
        (["plan", "--mesh", "dp"], 2, "such as dp=2,tp=2; not 'dp'"),
        (["plan", "--mesh", "dp=2,dp=2"], 2, "names a dimension twice"),
        (["plan", "--mesh", "pp=2"], 2, "only the model can say"),
    ],
)
def test_what_cannot_be_said(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    save(tmp_path, 7)
    ended, _, said = run(arguments[0], tmp_path, *arguments[1:])
    assert ended == status
    assert words in said


def test_nothing_there_and_a_damaged_record(tmp_path: Path) -> None:
    for command in (["inspect"], ["plan", "--mesh", "dp=2"]):
        assert run(command[0], tmp_path / "none", *command[1:])[0] == 1
    save(tmp_path, 1)
    (tmp_path / "step_1/manifest.json").write_text("{}")
    for command in (["inspect"], ["plan", "--mesh", "dp=2"]):
        status, told, said = run(command[0], tmp_path, *command[1:])
        assert (status, told) == (1, "")
        assert "the record of step 1 is damaged" in said


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    save(tmp_path, 1)
    code = f"import sys; sys.argv = {['shardckpt', 'inspect', str(tmp_path)]!r}\n" + (
        "from shardckpt.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'fsspec', 's3fs', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)


def test_help_says_what_is_assumed() -> None:
    status, told, _ = run("plan", "--help")
    assert status == 0
    assert "FSDP2 and tensor parallelism" in " ".join(told.split())


def test_names_that_are_too_long_are_folded(tmp_path: Path) -> None:
    import torch

    import shardckpt as sc

    name: Any = "a_long_name." * 12 + "w"
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {name: torch.zeros(2)}}).result()
    told = run("inspect", tmp_path)[1]
    assert all(len(line) <= 80 for line in told.splitlines()[2:])
    assert f"model.{name}" in re.sub(r"float32 .*|\s", "", told.replace("8 B", ""))
