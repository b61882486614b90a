"""One process: what is saved is what was there at the call, and comes back bit for bit."""

from __future__ import annotations

import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import shardckpt as sc
from tests.engine.states import assert_same, snapshot, train, training


def test_a_fresh_program_resumes_exactly_where_the_other_was(tmp_path: Path) -> None:
    one = training()
    train(one, 3)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.resume(training()) is None
        checkpoints.save(3, one, metadata={"note": "first"})
        saved = snapshot(one)
        expected = train(one, 3)
        draws = (random.random(), np.random.rand(), torch.rand(1).item())
    other = training(seed=5)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        info = checkpoints.resume(other)
        assert info is not None
        assert (info.step, info.metadata, info.skipped) == (3, {"note": "first"}, ())
        assert_same(saved, snapshot(other))
        assert train(other, 3) == expected
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    assert other["model"].head.weight is other["model"].embed.weight


def test_training_may_go_on_at_once(tmp_path: Path) -> None:
    state = training()
    train(state, 1)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        wanted = {}
        for step in range(2, 8):
            pending = checkpoints.save(step, state)
            wanted[step] = snapshot(state)
            train(state, 1)
            state["model"].norm.running_mean.fill_(7.0)  # a buffer may change as soon as save has returned
            pending.result()
        for step, expected in wanted.items():
            other = training(seed=9)
            checkpoints.load(step, other)
            assert_same(expected, snapshot(other))


def test_a_save_before_the_first_step_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    state, twin = training(), training()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(0, state).result()
        assert not state["optimizer"].state
        torch.manual_seed(1)
        losses = train(state, 2)
        torch.manual_seed(1)
        assert train(twin, 2) == losses
        checkpoints.load(0, state)
        assert not state["optimizer"].state
        torch.manual_seed(1)
        assert train(state, 2) == losses


def test_every_file_opens_without_shardckpt(tmp_path: Path) -> None:
    state = training()
    train(state, 2)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(2, state).result()
        saved = snapshot(state)
    files = sorted((tmp_path / "step_2").glob("*.pt"))
    assert [file.name for file in files] == ["model.pt", "rank_0.pt"]
    for file in files:
        assert zipfile.ZipFile(file).testzip() is None
        if shutil.which("unzip"):
            subprocess.run(["unzip", "-tqq", file], check=True)
    for mmap in (True, False):
        model = torch.load(files[0], mmap=mmap, weights_only=True)
        rank = torch.load(files[1], mmap=mmap, weights_only=True)
        assert model["model"].keys() == saved["model"].keys()
        assert all(torch.equal(model["model"][key], value) for key, value in saved["model"].items())
        assert model["model"]["head.weight"].data_ptr() == model["model"]["embed.weight"].data_ptr()
        assert rank["progress"]["losses"] == saved["progress"]["losses"]
        assert rank["optimizer"]["state"]["body.weight"]["exp_avg"].shape == (300, 300)
        assert rank["nothing"] == {}


def test_a_step_saved_again_replaces_the_old_one_at_its_commit(tmp_path: Path) -> None:
    state = training()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        train(state, 1)
        saved = snapshot(state)
        checkpoints.save(1, state).result()
        assert checkpoints.steps() == [1]
        other = training(seed=3)
        checkpoints.load(1, other)
        assert_same(saved, snapshot(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1"]


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7), (300, 301)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def make(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        tensors = {}
        for dtype in DTYPES:
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
            tensors[str(dtype)] = raw.view(dtype).reshape(shape)
        return tensors

    state, other = {"all": make(0)}, {"all": make(1)}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        checkpoints.load(1, other)
    for name, tensor in state["all"].items():
        raw = [t.reshape(-1).view(torch.uint8) for t in (tensor, other["all"][name])]
        assert torch.equal(*raw), name


def test_views_and_strange_strides(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    state = {"t": {"transposed": base.t(), "every other": base[::2], "row": base[2], "whole": base, "again": base}}
    other = {"t": {key: torch.zeros_like(value) for key, value in state["t"].items()}}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        checkpoints.load(1, other)
    assert all(torch.equal(value, other["t"][key]) for key, value in state["t"].items())


def test_values_keep_their_types_and_int_keys(tmp_path: Path) -> None:
    values = {"a": (1, 2.5, None), "b": {1: "one", 2: [True, b"\0\xff"]}, "c": {"x", "y"}, "d": 2**80, "e": 1e-300}
    other: dict = {"v": dict.fromkeys(values), "top": 0}
    other["v"]["b"] = {1: None, 2: None}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"v": values, "top": "text"}).result()
        checkpoints.load(1, other)
    assert other == {"v": values, "top": "text"}


def test_python_values_are_those_of_the_call(tmp_path: Path) -> None:
    losses = [1.0]
    with sc.CheckpointManager(tmp_path) as checkpoints:
        pending = checkpoints.save(1, {"losses": losses})
        losses.append(2.0)
        pending.result()
        state = {"losses": None}
        checkpoints.load(1, state)
    assert state == {"losses": [1.0]}


def test_a_float32_moment_of_a_bfloat16_parameter_is_not_cast(tmp_path: Path) -> None:
    class Fp32Moments(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("m", torch.zeros(parameter.shape, dtype=torch.float32))
                    state["m"] += 1.0 / 3.0

    def make() -> dict:
        model = torch.nn.Linear(4, 4).to(torch.bfloat16)
        return {"model": model, "optimizer": Fp32Moments(model.parameters(), lr=0.1)}

    state, other = make(), make()
    state["optimizer"].step()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        checkpoints.load(1, other)
    moment = other["optimizer"].state[other["model"].weight]["m"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, torch.full((4, 4), 1.0 / 3.0))


def test_pending_save_tells_what_it_cost(tmp_path: Path) -> None:
    state = training()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        pending = checkpoints.save(1, state)
        assert pending.staged()
        info = pending.result()
        assert pending.done()
    report = pending.report
    files = sum(path.stat().st_size for path in (tmp_path / "step_1").glob("*.pt"))
    assert report.total_nbytes == report.nbytes == info.nbytes == files == pending.progress.written
    assert 0 < report.stall_s <= report.total_s
    assert report.stage_s > 0
    assert report.write_s > 0
    assert report.commit_s > 0
    assert report.rate > 0


def test_a_conjugate_is_not_taken_for_its_original(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    other = {"z": {"z": torch.zeros(2, dtype=z.dtype), "conj": torch.zeros(2, dtype=z.dtype)}}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"z": {"z": z, "conj": z.conj()}}).result()
        checkpoints.load(1, other)
    assert other["z"]["z"].tolist() == [1 + 2j, 3 - 4j]
    assert other["z"]["conj"].tolist() == [1 - 2j, 3 + 4j]


def test_metadata_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        for metadata in ({"x": float("nan")}, {"x": object()}):
            with pytest.raises(sc.InvalidStateError, match="metadata"):
                checkpoints.save(1, {"a": 1}, metadata=metadata)
        assert checkpoints.steps() == []
