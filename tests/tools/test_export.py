"""Exports of steps, on any ranks: judged by `safetensors` and `torch.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from shardckpt.testing.faults import flip_byte
from tests.distributed.tensors import same_bits
from tests.engine.states import Net
from tests.manager.transactions import Size
from tests.tools.making import save, save_on
from tests.tools.moving.reading import same
from tests.tools.moving.test_step_ranks import FSDP_TP, save_placed
from tests.tools.moving.test_step_sink import MIB


def test_what_ranks_saved_in_pieces_is_whole_in_both_forms(ranks: Any, tmp_path: Path) -> None:
    grid, placed = FSDP_TP
    ranks.run(grid.ranks, save_placed, tmp_path / "run", grid, placed)
    for form, name in (("safetensors", "model.safetensors"), ("pt", "pytorch_model.bin")):
        report = sc.export(tmp_path / "run", tmp_path / form, form=form)  # type: ignore[arg-type]
        path = tmp_path / form / name
        found = load_file(path) if form == "safetensors" else torch.load(path, mmap=True, weights_only=True)
        assert set(found) == {item.tensor.name for item in placed}
        assert [
            item.tensor.name for item in placed if not same_bits(found[item.tensor.name], item.tensor.content())
        ] == []
        assert (report.form, report.tensors) == (form, len(placed))
        assert report.nbytes == sum(value.nbytes for value in found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_a_cast_is_what_torch_makes_of_it(tmp_path: Path, dtype: str) -> None:
    model = Net()
    with sc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"model": model}).result()
    report = sc.export(tmp_path / "run", tmp_path / "a.safetensors", dtype=dtype, means=sc.Means(budget_nbytes=MIB))
    sc.export(tmp_path / "run", tmp_path / "a.pt", form="pt", dtype=dtype)
    of = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), of)
    found = load_file(tmp_path / "a.safetensors")
    assert report.nbytes == sum(value.nbytes for value in found.values())
    del of["head.weight"]
    assert same(dict(sorted(found.items())), dict(sorted(of.items())))


def test_the_newest_step_with_the_files_of_its_model(tmp_path: Path) -> None:
    copies = {"config.json": "{}", "tokenizer.json": "[]", "tokenizer_config.json": "{}", "merges.txt": "a b"}
    (tmp_path / "run/cc").mkdir(parents=True)
    for name, text in {**copies, "train.sh": "no"}.items():
        (tmp_path / "run/cc" / name).write_text(text)
    save(tmp_path / "run", 1, 3)
    told: list[tuple[int, int, int]] = []
    report = sc.export(tmp_path / "run", tmp_path / "out", means=sc.Means(told=lambda *seen: told.append(seen)))
    assert (report.step, sorted(report.copied), report.notes) == (3, sorted(copies), ())
    assert load_file(tmp_path / "out/model.safetensors")["weight"].tolist() == [[3.0] * 3] * 2
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.name in copies} == copies
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert sum(nbytes for _, nbytes, _ in told) == report.nbytes
    assert {(step, total) for step, _, total in told} == {(3, report.nbytes)}
    url = f"memory://{tmp_path.name}"
    sc.export(tmp_path / "run/step_1", f"{url}/a.safetensors")
    assert sc.export(tmp_path / "run", f"{url}/b", step=1, part="optimizer").tensors == 1


def test_wrong_arguments_and_damage_leave_nothing(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    to = tmp_path / "out"
    for arguments in ({"form": "stone"}, {"dtype": "int8"}, {"form": "pt", "max_file_nbytes": 3}):
        with pytest.raises(ValueError, match=r"form|dtype|max_file"):
            sc.export(tmp_path / "run", to, **arguments)  # type: ignore[arg-type]
    for missing in ({"step": 2}, {"part": "ema"}):
        with pytest.raises(CheckpointNotFoundError, match=r"step"):
            sc.export(tmp_path / "run", to, **missing)  # type: ignore[arg-type]
    file = tmp_path / "run/step_1/model.pt"
    flip_byte(file, file.read_bytes().index(torch.full((2, 3), 1).numpy().tobytes()) + 3)
    for form in ("safetensors", "pt"):
        with pytest.raises(CheckpointDamagedError, match=r"model\.pt"):
            sc.export(tmp_path / "run", to, form=form)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ranks_that_differ_are_told_of(tmp_path: Path) -> None:
    save_on(Size(2), tmp_path / "run", 1)
    report = sc.export(tmp_path / "run", tmp_path / "out", form="pt", part="optimizer")
    assert report.notes == ("ranks held different ones of optimizer.state.0.exp_avg; those of rank 0 were taken",)
