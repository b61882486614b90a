"""What is written as safetensors, judged by the `safetensors` library: bit for bit, sharded, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, load_model

import shardckpt as sc
from shardckpt.errors import CheckpointLoadError, CheckpointSaveError, InvalidStateError
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.tools.moving.safetensors_sink import SafetensorsSink
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window
from shardckpt.tools.moving.step import StepSource
from tests.engine.states import Net
from tests.tools.moving.reading import same
from tests.tools.moving.test_step_sink import MIB, Drain, Made


def everything() -> dict[str, torch.Tensor]:
    """Odd sizes, many dtypes, nothing, one number; narrow before wide."""
    torch.manual_seed(3)
    dtypes = ("bool", "uint8", "bfloat16", "float8_e4m3fn", "float64", "int16", "float32", "complex64", "uint64")
    values = {f"odd.{name}": torch.randint(0, 2, (7, 3)).to(getattr(torch, name)) for name in dtypes}
    return values | {"none": torch.empty(0, 4), "one": torch.tensor(3.5), "large": torch.randn(3, 1 << 18)}


def alike(found: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> bool:
    """The same bits under the same names; `safetensors` keeps no order."""
    return same(dict(sorted(found.items())), dict(sorted(values.items())))


def saved(root: Any, model: Any) -> None:
    with sc.CheckpointManager(root) as manager:
        manager.save(1, {"model": model, "progress": {"step": 1}}).result()


def write(root: Any, where: Any, **options: Any) -> None:
    with StepSource.open(root, part="model") as source:
        SafetensorsSink(where, **options).write(source, budget_nbytes=8 * MIB)


def test_every_dtype_bit_for_bit_in_one_file(tmp_path: Path) -> None:
    values = everything()
    saved(tmp_path / "run", values)
    write(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert alike(load_file(tmp_path / "out/model.safetensors"), values)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_sharding_by_size_with_an_index(tmp_path: Path) -> None:
    values = {f"w{number}": torch.full((100,), float(number)) for number in range(5)} | {"big": torch.ones(300)}
    saved(tmp_path / "run", values)
    write(tmp_path / "run", tmp_path / "out", max_file_nbytes=800, beside={"config.json": b"{}"})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert index["metadata"] == {"total_size": 3200}
    assert index["weight_map"] == dict(zip(values, [files[n // 2] for n in range(5)] + [files[3]], strict=True))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *files,
        "model.safetensors.index.json",
        "config.json",
    }
    found: dict[str, torch.Tensor] = {}
    for name in files:
        found |= load_file(tmp_path / "out" / name)
    assert alike(found, values)
    sc.convert(tmp_path / "out", tmp_path / "back", step=2)
    with sc.CheckpointManager(tmp_path / "back") as manager:
        assert alike(manager.load_checkpoint(2)["model"], values)


def test_ties_are_written_once(tmp_path: Path) -> None:
    model, fresh = Net(), Net()
    saved(tmp_path / "run", model)
    write(tmp_path / "run", tmp_path / "tied.safetensors")
    assert "head.weight" not in load_file(tmp_path / "tied.safetensors")
    load_model(fresh, tmp_path / "tied.safetensors")
    assert alike(dict(fresh.state_dict()), dict(model.state_dict()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tied.safetensors"]


@pytest.mark.parametrize("kind", ["url", "file", "objects", "memory"])
def test_any_place(tmp_path: Path, kind: str) -> None:
    values = {"w": torch.randn(5), "b": torch.randn(3)}
    saved(tmp_path / "run", values)
    url = f"memory://{tmp_path.name}/out"
    where: Any = {"objects": MemoryObjects(), "memory": MemoryStorage(), "url": url, "file": f"{url}.safetensors"}[kind]
    write(tmp_path / "run", where)
    place = open_storage(url.rpartition("/")[0] if kind == "file" else url) if kind in ("url", "file") else where
    name = "out.safetensors" if kind == "file" else "model.safetensors"
    assert alike(load(place.read(name)), values)
    with pytest.raises(CheckpointSaveError, match="is there already"):
        write(tmp_path / "run", where)


def test_what_is_there_stays(tmp_path: Path) -> None:
    saved(tmp_path / "run", {"w": torch.ones(3)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.safetensors").write_text("mine")
    for name in ("folder", "file.safetensors"):
        with pytest.raises(CheckpointSaveError, match=f"{name} is there already: name another"):
            write(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.safetensors", "folder", "run"]


class Failing(Made):
    def read(self, windows: Any) -> None:
        super().read(windows)
        if self.passes > 3:
            raise CheckpointLoadError("the network is gone")


@pytest.mark.parametrize("name", ["out", "out.safetensors", "objects"])
@pytest.mark.parametrize("most", [MIB, 1 << 40])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, name: str, most: int) -> None:
    where: Any = MemoryObjects() if name == "objects" else tmp_path / name
    source = Failing(a=3 * MIB, b=3 * MIB, c=3 * MIB, d=3 * MIB)
    with pytest.raises(CheckpointLoadError, match="the network is gone"):
        SafetensorsSink(where, max_file_nbytes=most).write(source, budget_nbytes=8 * MIB)
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(where, MemoryObjects) or where.list() == []


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_who_comes_first_stays(tmp_path: Path, name: str) -> None:
    class Late(Made):
        def read(self, windows: Any) -> None:
            super().read(windows)
            (tmp_path / name).mkdir(exist_ok=True)

    with pytest.raises(CheckpointSaveError, match=f"{name} is there already"):
        SafetensorsSink(tmp_path / name).write(Late(a=100), budget_nbytes=MIB)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert list((tmp_path / name).iterdir()) == []


class Swallowing(Drain):
    def put(self, key: str, parts: Any) -> int:
        return sum(memoryview(part).nbytes for part in parts)


def test_no_more_than_the_budget_is_asked_for_at_once() -> None:
    source = Made(large=48 * MIB, other=30 * MIB, **{f"small{n}": 1000 for n in range(40)})
    SafetensorsSink(Swallowing(MemoryStorage())).write(source, budget_nbytes=16 * MIB)
    assert source.most == 4 * MIB


@pytest.mark.parametrize(
    ("tree", "dtype", "says"),
    [
        ({"model": {"w": TensorName("w"), "a": 3, "b": "x"}}, "uint8", "only tensors, and a, b are something else"),
        ({"model": {"w": TensorName("w")}, "optimizer": {}}, "uint8", "there is model, optimizer: name one"),
        ({"model": {"w": TensorName("w")}}, "complex128", "no name for tensors of complex128"),
        ({"model": {"__metadata__": TensorName("w")}}, "uint8", "can be called '__metadata__'"),
        ({"model": {"a.b": TensorName("w"), "a": {"b": TensorName("w")}}}, "uint8", "both called 'a.b'"),
    ],
)
def test_what_the_form_cannot_hold(tmp_path: Path, tree: Any, dtype: str, says: str) -> None:
    source = Made()
    source.tree, source.tensors = tree, {"w": TensorFacts(dtype, (3,))}
    with pytest.raises(InvalidStateError, match=says):
        SafetensorsSink(tmp_path / "out").write(source, budget_nbytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_reads_never_cut_an_element(tmp_path: Path) -> None:
    source = Made()
    source.tensors = {"n": TensorFacts("uint8", (MIB + 1,)), "w": TensorFacts("float64", (MIB,))}
    source.tree = {"model": {name: TensorName(name) for name in source.tensors}}
    seen: list[Window] = []
    source.read = seen.extend  # type: ignore[assignment, method-assign]
    SafetensorsSink(tmp_path / "out").write(source, budget_nbytes=MIB)
    assert {window.start % 8 for window in seen if window.name == "w"} == {0}
    assert len(seen) >= 5
