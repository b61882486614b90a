"""What lies at a place is told by its names, and comes by parts, as the programs that wrote it would read it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardckpt as sc
from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.storage.memory import MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.tools.moving.folders import find, open_source
from shardckpt.tools.moving.foreign.shapes import by_parameter
from tests.tools.moving.reading import same, state_of

MODEL = {"encoder.weight": torch.randn(3, 4), "encoder.bias": torch.randn(3).to(torch.bfloat16)}
OPTIMIZER = {"state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.randn(3, 4)}}, "param_groups": [{"params": [0]}]}
SCHEDULER = {"last_epoch": 2, "_last_lr": [0.1]}


def parts_of(place: Any, **options: Any) -> dict[str, Any]:
    source = open_source(place, **options)
    try:
        return state_of(source)
    finally:
        source.close()


def save_trainer(folder: Path, *, ranks: int = 1) -> dict[str, Any]:
    """As `transformers.Trainer._save_checkpoint` leaves it."""
    folder.mkdir(parents=True)
    save_file(MODEL, folder / "model.safetensors", {"format": "pt"})
    torch.save(OPTIMIZER, folder / "optimizer.pt")
    torch.save(SCHEDULER, folder / "scheduler.pt")
    streams = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for rank in range(ranks):
        torch.save(streams, folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))
    progress = {"global_step": 7, "log_history": [{"loss": math.nan, "step": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(progress))
    (folder / "training_args.bin").write_bytes(b"a pickle of the program's own")
    return streams


def test_a_trainers_checkpoint_comes_by_parts(tmp_path: Path) -> None:
    streams = save_trainer(tmp_path / "checkpoint-7")
    found = find(tmp_path / "checkpoint-7")
    state = state_of(found.source)
    found.source.close()
    assert (found.kind, found.step, list(state)) == (
        "a checkpoint of Trainer",
        7,
        ["model", "optimizer", "scheduler", "rng", "progress"],
    )
    assert same([state["model"], state["optimizer"], state["scheduler"]], [MODEL, OPTIMIZER, SCHEDULER])
    assert math.isnan(state["progress"]["log_history"][0]["loss"])
    assert "training_args.bin is not read" in found.notes[0]
    sc.RngState().load_state_dict(state["rng"])
    assert random.getstate() == streams["python"]
    assert np.random.get_state()[1].tolist() == streams["numpy"][1].tolist()


def test_the_last_checkpoint_of_a_folder_is_meant_or_the_one_that_is_named(tmp_path: Path) -> None:
    for number in (7, 12):
        save_trainer(tmp_path / f"checkpoint-{number}", ranks=2)
    assert find(tmp_path, parts=["progress"]).step == 12
    assert find(tmp_path, step=7, parts=["progress"]).step == 7
    assert list(parts_of(tmp_path, parts=["rng_1", "model"])) == ["model", "rng_1"]
    with pytest.raises(CheckpointNotFoundError, match="no step 8"):
        find(tmp_path, step=8)
    with pytest.raises(CheckpointNotFoundError, match="has nothing, and not scaler"):
        find(tmp_path, parts=["scaler"])


def test_what_is_not_wanted_is_not_opened(tmp_path: Path) -> None:
    save_trainer(tmp_path / "c")
    (tmp_path / "c" / "optimizer.pt").write_bytes(b"nonsense")
    assert same(parts_of(tmp_path / "c", parts=["model"])["model"], MODEL)
    with pytest.raises(CheckpointDamagedError, match=r"optimizer\.pt"):
        find(tmp_path / "c")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_a_models_folder_or_file_is_the_part_model(tmp_path: Path, name: str) -> None:
    if name.endswith(".bin"):
        torch.save(MODEL, tmp_path / name)
    else:
        save_file(MODEL, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / name, f"file://{tmp_path / name}"):
        assert same(dict(sorted(parts_of(place)["model"].items())), dict(sorted(MODEL.items())))


def test_what_lies_beside_a_model_comes_with_it_or_is_named(tmp_path: Path) -> None:
    """Training programs put the rest of their state into one file; of others it is said that they are not read."""
    save_file(MODEL, tmp_path / "model.safetensors")
    state = {"optimizer": OPTIMIZER, "lr_scheduler": SCHEDULER, "global_step": 7, "model": {"a": 1}}
    torch.save(state, tmp_path / "training_state.pt")
    for name in ("random_states_0.pkl", "optimizer.bin", "pytorch_model-00001-of-00002.bin", "README.md"):
        (tmp_path / name).write_bytes(b"")
    found = find(tmp_path)
    parts = state_of(found.source)
    found.source.close()
    assert (found.kind, found.step) == ("a model's folder with its training_state.pt", 7)
    assert list(parts) == ["model", "optimizer", "lr_scheduler", "global_step"]
    assert same([parts["optimizer"], parts["lr_scheduler"]], [OPTIMIZER, SCHEDULER])
    assert found.notes == (
        "the model in training_state.pt is not read, but the one beside it",
        "not read: optimizer.bin, random_states_0.pkl",
    )
    report = sc.convert(tmp_path, tmp_path / "run", parts=["model"])
    assert (report.parts, report.step, report.notes) == (("model",), 0, ())
    torch.save({"optimizer": torch.nn.Linear(1, 1)}, tmp_path / "training_state.pt")
    with pytest.raises(CheckpointDamagedError, match=r"training_state\.pt in .* the model alone is --part model"):
        find(tmp_path)
    assert find(tmp_path, parts=["model"]).step is None


def test_a_lightning_file_comes_by_parts(tmp_path: Path) -> None:
    content = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": MODEL,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [SCHEDULER],
        "hparams_name": "kwargs",
    }
    torch.save(content, tmp_path / "epoch=1-step=20.ckpt")
    found = find(tmp_path / "epoch=1-step=20.ckpt")
    state = state_of(found.source)
    assert found.step == 20
    assert same([state["model"], state["optimizer"], state["scheduler"]], [MODEL, OPTIMIZER, SCHEDULER])
    rest = {key: content[key] for key in ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks")}
    assert same(state["progress"], {**rest, "hparams_name": "kwargs"})
    torch.save(content | {"optimizer_states": [OPTIMIZER, OPTIMIZER], "lr_schedulers": []}, tmp_path / "two.ckpt")
    assert list(parts_of(tmp_path / "two.ckpt")) == ["model", "optimizers", "progress"]


def test_a_step_of_fairseq2_is_put_together_as_it_does(tmp_path: Path) -> None:
    folder = tmp_path / "step_1000"
    folder.mkdir()
    torch.save({"net": MODEL, "model_key": "net"}, folder / "model.pt")
    torch.save({"optimizer": OPTIMIZER, "step_nr": 1000}, folder / "rank_0.pt")
    torch.save({"epoch": 5, "ema": torch.ones(2)}, folder / "replicated.pt")
    for place in (folder, tmp_path):
        found = find(place)
        assert (found.kind, found.step) == ("a step of fairseq2", 1000)
        state = state_of(found.source)
        expected = {"optimizer": OPTIMIZER, "step_nr": 1000, "epoch": 5, "ema": torch.ones(2), "model": MODEL}
        assert same(dict(sorted(state.items())), dict(sorted(expected.items())))
    torch.save({"optimizer": {**OPTIMIZER, "param_groups": []}}, folder / "rank_1.pt")
    with pytest.raises(CheckpointLoadError, match=r"optimizer\.param_groups in step_1000/rank_1\.pt is another one"):
        find(tmp_path)
    assert same(parts_of(folder, parts=["model"]), {"model": MODEL})


def test_a_folder_of_torch_checkpointing_is_by_items(tmp_path: Path) -> None:
    for item, content in (("model", MODEL), ("optimizer", OPTIMIZER), ("step", 7)):
        torch.save(content, tmp_path / f"{item}_0.pt")
    found = find(tmp_path)
    assert (found.kind, found.step) == ("a checkpoint of torch_checkpointing", 7)
    assert same(dict(sorted(state_of(found.source).items())), {"model": MODEL, "optimizer": OPTIMIZER, "step": 7})
    torch.save(MODEL | {"encoder.bias": torch.zeros(3)}, tmp_path / "model_1.pt")
    with pytest.raises(CheckpointLoadError, match=r"model\.encoder\.bias in model_1\.pt is another one"):
        find(tmp_path)


def test_an_attempt_of_ours_is_no_step_of_anybody(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as manager:
        manager.save(5, {"model": MODEL, "rng": 1}).result()
    (tmp_path / "step_5" / "manifest.json").unlink()
    for place in (tmp_path, tmp_path / "step_5"):
        with pytest.raises(CheckpointLoadError, match="never committed, or has lost its record"):
            find(place)
    assert same(parts_of(tmp_path / "step_5" / "model.pt"), {"model": MODEL})


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (MODEL, {"model": MODEL}),
        ({**MODEL, "_extra_state": {"a": 1}}, {"model": {**MODEL, "_extra_state": {"a": 1}}}),
        ({"model_state_dict": MODEL, "optimizer_state_dict": OPTIMIZER, "epoch": 1}, None),
        ({"model": MODEL, "loss": torch.tensor(1.0)}, {"model": MODEL, "loss": torch.tensor(1.0)}),
        ({"state_dict": MODEL, "model": {"name": "x"}}, {"state_dict": MODEL, "model": {"name": "x"}}),
        ({1: MODEL}, {"1": MODEL}),
        ([torch.ones(1)], {"model": [torch.ones(1)]}),
    ],
)
def test_what_stands_in_a_file_is_by_parts(content: Any, parts: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "f.pt")
    expected = parts or {"model": MODEL, "optimizer": OPTIMIZER, "epoch": 1}
    assert same(parts_of(tmp_path / "f.pt"), expected)


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "f00d"
    for folder in (repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    save_file(MODEL, repository / "blobs" / ("ab" * 32))
    link = snapshot / "model.safetensors"
    for target, good in ((f"../../blobs/{'ab' * 32}", True), (f"../../blobs/../../{'ab' * 32}", False)):
        link.symlink_to(target)
        save_file(MODEL, tmp_path / ("ab" * 32))
        if good:
            assert parts_of(snapshot)["model"].keys() == MODEL.keys()
        else:
            with pytest.raises(CheckpointError):
                parts_of(snapshot)
        link.unlink()


def test_any_url_is_read(tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "model.safetensors")
    storage = open_storage("memory://any-url")
    try:
        storage.put("in/model.safetensors", [(tmp_path / "model.safetensors").read_bytes()])
        for place in ("memory://any-url/in", "memory://any-url/in/model.safetensors"):
            assert parts_of(place)["model"].keys() == MODEL.keys()
    finally:
        storage.delete_tree("in")
        storage.close()


@pytest.mark.parametrize(
    ("groups", "keys"),
    [
        ([{"params": [0, 1], "param_names": ["a", "b"]}], ["a", "b"]),
        ([{"params": [0], "param_names": ["a"]}, {"params": [1], "param_names": ["b"]}], ["a", "b"]),
        ([{"params": [0, 1]}], [0, 1]),
        ([{"params": [0, 1], "param_names": ["a"]}], [0, 1]),
        ([{"params": [0, 1], "param_names": ["a", "a"]}], [0, 1]),
        ([{"params": [0], "param_names": ["a"]}], [0, 1]),
        ([{"params": [[]], "param_names": [1]}], [0, 1]),
        ([1], [0, 1]),
        ({"a": 1}, [0, 1]),
    ],
)
def test_an_optimizer_goes_by_names_where_its_groups_tell_them(groups: Any, keys: list[Any]) -> None:
    tree = by_parameter({"state": {0: "x", 1: "y"}, "param_groups": groups})
    assert tree["state"] == dict(zip(keys, "xy", strict=True))
    if keys == ["a", "b"]:
        assert [name for group in tree["param_groups"] for name in group["params"]] == keys


def test_nothing_and_what_is_unknown_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        find(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointLoadError, match="no checkpoint of any known form"):
        find(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(MODEL, tmp_path / name)
    with pytest.raises(CheckpointLoadError, match="holds 2 files that may be meant"):
        find(tmp_path)


ODD: dict[str, dict[str, Any]] = {
    "trainer_state.json": {"trainer_state.json": b"[" * 100_000},
    "a list": {"trainer_state.json": b"[]"},
    "an index to above": {"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'},
    "a bin index to above": {"pytorch_model.bin.index.json": b'{"weight_map": {"a": "/etc/passwd"}}'},
    "a lightning file of numbers": {"f.ckpt": {"state_dict": 1, "optimizer_states": 2, "lr_schedulers": {}}},
    "a lightning file of odd lists": {"f.ckpt": {"state_dict": {}, "optimizer_states": [1], "lr_schedulers": [[]]}},
    "an odd model key": {"model.pt": {"model_key": ["x"], "x": 1}},
    "an odd rank file": {"rank_0.pt": [1, 2]},
    "an empty file": {"model.pt": b""},
    "a scheduler that is none": {"optimizer.pt": b"PK", "scheduler.pt": b""},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_content_is_our_own_error_or_a_state(case: str, tmp_path: Path) -> None:
    storage = MemoryStorage()
    for name, content in ODD[case].items():
        if not isinstance(content, bytes):
            torch.save(content, tmp_path / "x")
            content = (tmp_path / "x").read_bytes()
        storage.put(name, [content])
    try:
        state = parts_of(storage)
    except CheckpointError:
        return
    assert case.startswith(("a lightning file", "an odd"))
    assert isinstance(state, dict)
