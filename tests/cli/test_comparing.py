"""`diff`: what it prints, as text and as data, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import shardckpt as sc
import shardckpt.cli.looking.comparing
from shardckpt.tools.looking.two import diff
from tests.cli.test_listing import run
from tests.tools.making import save

TEXT = """\
A  {root}/step_1
B  {root}/step_2
tensor        dtype               shape  unequal  max   mean
model.bias    float32             3 / 4        -    -      -
model.half    float32 / bfloat16  2       0 of 2    0      0
model.weight  float32             2x3     1 of 6    1  0.167
only in A: model.old
only in B: model.new
step: 1 in A, 2 in B
3 tensors and 1 value in both; 3 tensors and 1 value of these differ"""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal that people have."""
    monkeypatch.setattr(
        shardckpt.cli.looking.comparing, "console", lambda: Console(width=80, highlight=False, markup=False)
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    weight = torch.zeros(2, 3)
    model = {"bias": torch.zeros(3), "half": torch.ones(2), "weight": weight, "old": torch.zeros(1)}
    other = {
        "bias": torch.zeros(4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "weight": weight.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0)),
        "new": torch.zeros(1),
    }
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"model": model, "step": 1}).result()
        checkpoints.save(2, {"model": other, "step": 2}).result()
    return tmp_path / "run"


def test_two_steps(root: Path) -> None:
    status, told, said = run("diff", root / "step_1", root)
    assert (status, said) == (1, "")
    assert told == TEXT.format(root=root)
    status, told, _ = run("diff", root / "step_1", root, "--json")
    found = json.loads(told)
    assert (status, found["alike"], found["second"]) == (1, False, f"{root}/step_2")
    difference = found["difference"]
    assert (difference["only_first"], difference["only_second"]) == (["model.old"], ["model.new"])
    assert difference["values"] == [{"name": "step", "texts": ["1", "2"]}]
    line = difference["tensors"][2]
    assert (line["name"], line["unequal"], line["elements"], line["max_abs"]) == ("model.weight", 1, 6, 1.0)


def test_it_says_how_far_it_is(root: Path) -> None:
    heard: list[tuple[int, int, int]] = []
    diff(root / "step_1", root / "step_2", budget=500, told=lambda *what: heard.append(what))
    total = 2 * 6 * 4 + 2 * (4 + 2)  # `weight`, and `half` in two dtypes; what has other shapes is not read
    assert {(step, most) for step, _, most in heard} == {(2, total)}
    assert sum(nbytes for _, nbytes, _ in heard) == total
    assert len(heard) > 1


def test_alike(tmp_path: Path) -> None:
    save(tmp_path / "a", 7)
    save(tmp_path / "b", 7)
    status, told, said = run("diff", tmp_path / "a", tmp_path / "b/step_7")
    assert (status, said) == (0, "")
    assert told == f"A  {tmp_path}/a/step_7\nB  {tmp_path}/b/step_7\n3 tensors and 1 value in both; alike"
    told = run("diff", tmp_path / "a", tmp_path / "b", "--filter", "model")[1]
    assert told.endswith("\n2 tensors and 0 values in both; alike")
    status, _, said = run("diff", tmp_path / "a", tmp_path / "b", "--filter", "modle")
    assert (status, said) == (1, "nothing in either matches modle")


@pytest.mark.parametrize(
    ("second", "arguments", "status", "words"),
    [
        ("none", [], 1, "there is nothing at"),
        ("run/step_9", [], 1, "run/step_9"),
        ("run", ["--rank", "3"], 2, "not by 3"),
        ("nonsense://a", [], 2, "nonsense"),
    ],
)
def test_what_cannot_be_compared(root: Path, second: str, arguments: list[str], status: int, words: str) -> None:
    other = second if "://" in second else root.parent / second
    ended, told, said = run("diff", root, other, *arguments)
    assert (ended, told) == (status, "")
    assert words in said
