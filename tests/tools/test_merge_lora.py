"""Adapters merged into their base from a step alone, against PEFT's own merge, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, InvalidStateError
from shardckpt.run.catalog import Catalog
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.open import open_storage
from shardckpt.testing.faults import flip_byte
from shardckpt.tools.merging.source import MergedSource
from shardckpt.tools.moving.seam import Window
from shardckpt.tools.moving.step import StepSource
from tests.cli.test_listing import run
from tests.storage.conftest import place, s3

__all__ = ["place", "s3"]  # fixtures

pytestmark = [
    pytest.mark.xdist_group("peft"),
    pytest.mark.leaks(threads=("tqdm_monitor",), why="transformers shows a bar while it loads"),
]

WIDTH = 96


class Mixed(nn.Module):
    """A layer of each kind that PEFT puts an adapter beside, and some that it leaves alone."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(40, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.square = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.to(dtype)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(words).mT)
        x = self.norm(self.point(x[..., None])[..., 0]).mean(-1)
        return self.head(self.square(self.narrow(torch.relu(self.wide(x)))))


TARGETS = ["embed", "conv", "point", "wide", "narrow", "square"]


def adapted(base: nn.Module, *, adapters: int = 1, **config: Any) -> Any:
    """A model of PEFT with adapters that do something."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    torch.manual_seed(2)
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": TARGETS, **config})
    model = peft.get_peft_model(base, lora)
    for number in range(1, adapters):
        model.add_adapter(f"more{number}", lora)
    return model


def saved(root: Any, model: nn.Module, *, frozen: tuple[str, ...] = ("*",)) -> dict[str, torch.Tensor]:
    """Save it, and give what PEFT then makes of it."""
    with sc.CheckpointManager(root) as checkpoints:
        checkpoints.save(1, {"model": model}, frozen=frozen).result()
    return dict(model.merge_and_unload().state_dict())  # type: ignore[operator]


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"wide": 7, "s.*e": 2},
        "alpha_pattern": {"wide": 9},
        "lora_bias": True,
        "target_modules": ["wide", "square"],
        "modules_to_save": ["head"],
    },
    "half of it": {"target_modules": ["wide", "embed"], "bias": "all"},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", torch.float32),
        ("plain", torch.bfloat16),
        ("patterns", torch.float32),
        ("half of it", torch.bfloat16),
    ],
    ids=str,
)
def test_every_kind_of_layer_is_what_peft_makes_of_it(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = adapted(Mixed(dtype), **KINDS[kind])
    if kind == "half of it":
        model.to(dtype)  # the adapter, too, which PEFT makes in float32
    config = model.peft_config["default"]
    if kind == "patterns":
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    wanted = saved(tmp_path / "run", model)
    report = sc.merge_lora(tmp_path / "run", tmp_path / "a.pt", form="pt", config=config.to_dict())
    check(torch.load(tmp_path / "a.pt", weights_only=True), wanted)
    count = len(KINDS[kind].get("target_modules", TARGETS))
    assert report.notes == (f"the adapter 'default' was merged into {count} tensors",)
    assert report.tensors == len(wanted)


def test_conv1d_of_transformers_is_turned_over(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(3)
    base = nn.Sequential(Conv1D(2 * WIDTH, WIDTH), Conv1D(WIDTH, 2 * WIDTH), Conv1D(WIDTH, WIDTH))
    model = adapted(base, target_modules=["0", "1", "2"], fan_in_fan_out=True)
    config = model.peft_config["default"].to_dict()
    wanted = saved(tmp_path / "run", model)
    sc.merge_lora(tmp_path / "run", tmp_path / "a.safetensors", config=config)
    found = load_file(tmp_path / "a.safetensors")
    check({name: found[name] for name in wanted}, wanted)
    with pytest.raises(InvalidStateError, match=r"2\.weight is square: fan_in_fan_out must say which way"):
        sc.merge_lora(tmp_path / "run", tmp_path / "b", config={**config, "fan_in_fan_out": False})


def test_one_of_several_adapters_and_another_dtype(tmp_path: Path) -> None:
    model = adapted(Mixed(), adapters=2)
    config = model.peft_config["default"].to_dict()
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"model": model}, frozen=("*",)).result()
    with pytest.raises(InvalidStateError, match="several adapters, default, more1: say which"):
        sc.merge_lora(tmp_path / "run", tmp_path / "a", config=config)
    sc.merge_lora(tmp_path / "run", tmp_path / "a", config=config, adapter="more1", dtype="bfloat16")
    model.set_adapter("more1")
    wanted = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "a/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in wanted.items())
    assert found["wide.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("nbytes", [1000, 4096, 40_001])
def test_in_parts_it_comes_out_the_same(tmp_path: Path, nbytes: int) -> None:
    """Also where a part begins in the middle of a row, or of an element."""
    model = adapted(Mixed())
    config = model.peft_config["default"].to_dict()
    wanted = saved(tmp_path / "run", model)
    from shardckpt.tools.merging.config import lora_config

    with StepSource.open(tmp_path / "run", part="model") as source:
        merged = MergedSource(source, lora_config(config), part="model")
        for name in ("wide", "embed", "conv", "square"):
            facts = merged.tensors[f"model.{name}.weight"]
            content = bytearray(facts.nbytes)
            for start in range(0, facts.nbytes, nbytes):
                merged.read([Window(f"model.{name}.weight", start, memoryview(content)[start : start + nbytes])])
            found = torch.frombuffer(content, dtype=torch.float32).view(facts.shape)
            assert torch.allclose(found, wanted[f"{name}.weight"], rtol=1e-6, atol=1e-6)
            assert (found == wanted[f"{name}.weight"]).float().mean() > 0.99


def test_the_configuration_lies_beside_and_does_not_go_out(tmp_path: Path) -> None:
    model = adapted(Mixed(), target_modules=["wide"])
    (tmp_path / "run/cc").mkdir(parents=True)
    model.peft_config["default"].save_pretrained(tmp_path / "run/cc")
    (tmp_path / "run/cc/config.json").write_text("{}")
    wanted = saved(tmp_path / "run", model)
    status, told, said = run("merge-lora", tmp_path / "run", tmp_path / "a")
    assert (status, told) == (0, f"step 1: {len(wanted)} tensors, {told.partition(', ')[2]}")
    assert told.endswith("written as safetensors, with config.json")
    assert said == "the adapter 'default' was merged into 1 tensor"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors"}
    found = load_file(tmp_path / "a/model.safetensors")
    check({name: found[name] for name in wanted}, wanted)
    options = ("--config", tmp_path / "run/cc", "--adapter", "default", "--form", "pt", "--json")
    status, told, _ = run("merge-lora", tmp_path / "run", tmp_path / "b.pt", *options)
    assert (status, json.loads(told)["form"]) == (0, "pt")
    check(torch.load(tmp_path / "b.pt", weights_only=True), wanted)
    for wrong in (("--adapter", "x"), ("--form", "stone"), ("--dtype", "int8"), ("--config", tmp_path / "none")):
        assert run("merge-lora", tmp_path / "run", tmp_path / "c", *wrong)[0] == 2
    assert run("merge-lora", tmp_path / "run", tmp_path / "c", "--step", 9)[0] == 1
    assert not (tmp_path / "c").exists()


class Layer(nn.Module):
    """A linear layer with an adapter, named as PEFT names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, width)
        self.base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, width, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def train_sharded(rank: int, world_size: int, folder: Path, root: str, options: dict[str, Any] | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(4)
    model = nn.Sequential(Layer(33), nn.Tanh(), Layer(33))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sc.CheckpointManager(root, storage_options=options) as checkpoints:
        for step in (1, 2):
            model(torch.randn(8, 33)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.save(step, {"model": model, "optimizer": optimizer}, frozen=("*",)).result()


def test_from_a_mesh(ranks, tmp_path):
    check_a_mesh(ranks, tmp_path, str(tmp_path / "run"), None)


@pytest.mark.s3
@pytest.mark.larger
def test_from_a_mesh_on_an_object_store(ranks, tmp_path, s3, place):
    check_a_mesh(ranks, tmp_path, place(s3), dict(s3.options))


def check_a_mesh(ranks: Any, tmp_path: Path, root: str, options: dict[str, Any] | None) -> None:
    """FSDP2 on two ranks, with uneven shards; the base of each rank is stored once."""
    ranks.run(2, train_sharded, root, options)
    config, means = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, sc.Means(storage_options=options)
    sc.merge_lora(root, tmp_path / "a.pt", form="pt", config=config, means=means)
    sc.export(root, tmp_path / "b.pt", form="pt", means=means)
    with closing(open_storage(root, storage_options=options)) as storage:
        shared = [file.blob.rpartition("/")[2] for file in Catalog(storage).record(2)[1].files if file.blob]
    assert sorted(shared) == ["frozen_rank_0.pt", "frozen_rank_1.pt"]
    found, apart = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for layer in ("0", "2"):
        a, b = (apart[f"{layer}.lora_{name}.default.weight"] for name in "AB")
        assert torch.equal(found[f"{layer}.weight"], apart[f"{layer}.base_layer.weight"] + (b @ a) * 2.0)
        assert torch.equal(found[f"{layer}.bias"], apart[f"{layer}.base_layer.bias"])
    model = nn.Sequential(nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 33))
    model.load_state_dict(found)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True, "target_modules": ["wide"]}, {}, "an adapter with use_dora is not merged here"),
    "DoRA, not said": ({"use_dora": True, "target_modules": ["wide"]}, {"use_dora": False}, "magnitude_vector.* PEFT"),
    "another rank": ({}, {"r": 8}, "embed has an adapter of rank 4, and the configuration says 8; conv has"),
    "no rank": ({}, {"r": "4"}, "lacks something"),
    "another method": ({}, {"peft_type": "IA3"}, "no LoRA adapter: its peft_type is 'IA3'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(tmp_path: Path, name: str) -> None:
    of_model, of_config, told = REFUSED[name]
    model = adapted(Mixed(), **of_model)
    config = {**model.peft_config["default"].to_dict(), **of_config}
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"model": model}).result()
    with pytest.raises(InvalidStateError, match=told):
        sc.merge_lora(tmp_path / "run", tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def made(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    state = {
        "a.base_layer.weight": torch.ones(6, 5),
        "a.lora_A.default.weight": torch.ones(2, 5),
        "a.lora_B.default.weight": torch.ones(6, 2),
        "b.weight": torch.ones(6, 5),
    }
    change(state)
    return state


ODD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tied": (lambda s: s.update({"b.weight": s["a.base_layer.weight"]}), r"a\.weight: tied to another"),
    "quantized": (lambda s: s.update({"a.base_layer.weight": torch.ones(6, 5).byte()}), "a.weight is uint8"),
    "packed": (lambda s: s.update({"a.base_layer.weight": torch.ones(15)}), r"\[15\], and B @ A is \[6, 5\]"),
    "half of it": (lambda s: s.pop("a.lora_B.default.weight"), "beside a is not whole"),
    "no base": (lambda s: s.pop("a.base_layer.weight"), "beside a is not whole"),
    "no adapter": (lambda s: [s.pop(f"a.lora_{name}.default.weight") for name in "AB"], "no adapter in this model"),
    "other parts": (lambda s: s.update({"c.token_adapter.default.x": torch.ones(1)}), "token_adapter.*with PEFT"),
    "two of a name": (lambda s: s.update({"a.weight": torch.ones(1)}), "would both be a.weight"),
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    change, told = ODD[name]
    place = MemoryObjects()
    with sc.CheckpointManager(place) as checkpoints:
        checkpoints.save(1, {"model": made(change)}).result()
    with pytest.raises(InvalidStateError, match=told):
        sc.merge_lora(place, MemoryObjects(), config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})


def test_what_is_not_there_or_damaged(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"model": made(lambda state: None)}).result()
        checkpoints.save(2, {"other": torch.ones(1)}).result()
    with pytest.raises(CheckpointNotFoundError, match="has no 'model', but"):
        sc.merge_lora(tmp_path / "run", tmp_path / "out", config=config)
    with pytest.raises(InvalidStateError, match=r"no copy of adapter_config\.json"):
        sc.merge_lora(tmp_path / "run", tmp_path / "out", step=1)
    for given, told in ((tmp_path, "cannot be read"), (tmp_path / "x", "no JSON")):
        (tmp_path / "x").write_text("{")
        with pytest.raises(InvalidStateError, match=told):
            sc.merge_lora(tmp_path / "run", tmp_path / "out", step=1, config=given)
    source = tmp_path / "run/step_1/model.pt"
    content = source.read_bytes()
    flip_byte(source, content.index(torch.ones(12).numpy().tobytes()))
    with pytest.raises(CheckpointDamagedError):
        sc.merge_lora(tmp_path / "run", tmp_path / "out", step=1, config=config)
    assert not (tmp_path / "out").exists()
