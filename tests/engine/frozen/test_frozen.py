"""A frozen base is stored once per run, and each step is whole all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.errors import CheckpointDamagedError, CheckpointSaveError, InvalidStateError
from shardckpt.format.layout import BLOBS
from shardckpt.run.catalog import Catalog
from shardckpt.storage import LocalStorage, MemoryObjects
from shardckpt.storage.base import Storage
from shardckpt.tools.contents import files_below
from shardckpt.tools.listing import list_checkpoints
from shardckpt.tools.verify import verify
from tests.engine.frozen.lora import content, is_adapter, same, tune, tuning

FROZEN = ("*",)


@pytest.fixture(params=["files", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    """Makes an empty place of each kind."""
    made: list[Storage] = []

    def make() -> Storage:
        made.append(LocalStorage(tmp_path / str(len(made))) if request.param == "files" else MemoryObjects())
        return made[-1]

    return make


def nbytes(storage: Storage) -> int:
    return sum(storage.size(name) for name in files_below(storage, ""))


def blobs(storage: Storage) -> list[str]:
    return [f"{BLOBS}/{name}" for name in files_below(storage, BLOBS)]


def run(storage: Storage, *, frozen: tuple[str, ...], steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """Fine-tune, and save after every step; gives what was saved."""
    state, saved = tuning(), dict[int, dict[str, torch.Tensor]]()
    with sc.CheckpointManager(storage) as checkpoints:
        for step in range(1, steps + 1):
            tune(state)
            checkpoints.save(step, state, frozen=frozen)
            saved[step] = content(state)
    return saved


def test_ten_steps_of_lora_take_a_seventh_of_the_bytes(place: Callable[[], Storage]) -> None:
    full, shared = place(), place()
    run(full, frozen=(), steps=10)
    saved = run(shared, frozen=FROZEN, steps=10)
    assert nbytes(shared) <= 0.15 * nbytes(full)
    (base,) = blobs(shared)
    assert shared.size(base) > 0.9 * nbytes(full) / 10
    for step in (1, 10):
        other = tuning(seed=7)
        with sc.CheckpointManager(shared) as checkpoints:
            checkpoints.load(step, other)
        assert same(saved[step], content(other))
    assert verify(shared).ok
    lines = list_checkpoints(shared).steps
    assert {line.shared_nbytes for line in lines} == {shared.size(base)}
    assert all(line.nbytes is not None and line.nbytes > line.shared_nbytes for line in lines)


def test_a_run_goes_on_from_a_step_with_a_shared_base(place: Callable[[], Storage]) -> None:
    storage = place()
    one = tuning()
    tune(one, 2)
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(2, one, frozen=FROZEN).result()
        expected = tune(one, 3)
    other = tuning(seed=3)
    for parameter in other["model"].parameters():
        torch.nn.init.zeros_(parameter)  # the base comes from the checkpoint, too
    with sc.CheckpointManager(storage) as checkpoints:
        resumed = checkpoints.resume(other)
        assert resumed is not None
        assert resumed.step == 2
        assert tune(other, 3) == expected
        pending = checkpoints.save(5, other, frozen=FROZEN)
        info = pending.result()
    assert len(blobs(storage)) == 1
    assert pending.report.nbytes < 0.15 * info.nbytes == 0.15 * pending.report.total_nbytes


def test_base_or_adapter_alone(tmp_path: Path) -> None:
    state = tuning()
    tune(state)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state, frozen=FROZEN)
    wanted = state["model"].state_dict()
    for kind in (is_adapter, lambda name: not is_adapter(name)):
        fresh = {name: torch.zeros_like(value) for name, value in wanted.items() if kind(name)}
        with sc.CheckpointManager(tmp_path) as checkpoints:
            checkpoints.load(1, {"model": fresh}, policy=sc.LoadPolicy(unexpected="ignore"))
        assert fresh
        assert all(torch.equal(value, wanted[name]) for name, value in fresh.items())
    adapter = torch.load(tmp_path / "step_1/model.pt", weights_only=True)["model"]
    assert {name for name in adapter if not name.startswith("norm.")} == {n for n in wanted if is_adapter(n)}
    (base,) = blobs(LocalStorage(tmp_path))
    held = torch.load(tmp_path / base, mmap=True, weights_only=True)["model"]
    assert held.keys() | adapter.keys() == wanted.keys()
    assert held["head.weight"].data_ptr() == held["embed.weight"].data_ptr()


def test_load_checkpoint_gives_all_of_it(place: Callable[[], Storage]) -> None:
    storage, state = place(), tuning()
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, state, frozen=("model.layers.0.base", "model.embed"))
    with sc.CheckpointManager(storage) as checkpoints:
        _, loaded = checkpoints.load_last_checkpoint()
    wanted = state["model"].state_dict()
    assert loaded["model"].keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded["model"].items())


def test_what_has_changed_is_stored_anew_and_what_is_back_is_found_again(place: Callable[[], Storage]) -> None:
    storage, base = place(), torch.arange(1000.0)
    with sc.CheckpointManager(storage) as checkpoints:
        for step, value in enumerate((0.0, 0.0, 1.0, 0.0), start=1):
            checkpoints.save(step, {"base": base + value, "step": step}, frozen=("base",)).result()
        named = [Catalog(storage).record(step)[1].files[0].blob for step in range(1, 5)]
        assert len(blobs(storage)) == 2
        assert named[0] == named[1] == named[3] != named[2]
        for step, value in enumerate((0.0, 0.0, 1.0, 0.0), start=1):
            state: dict[str, Any] = {"base": torch.zeros(1000), "step": 0}
            checkpoints.load(step, state)
            assert torch.equal(state["base"], base + value)
            assert state["step"] == step


def test_a_step_without_frozen_tensors_is_the_same_to_the_last_byte(tmp_path: Path) -> None:
    state = tuning()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    assert not (tmp_path / BLOBS).exists()
    assert (tmp_path / "step_1/manifest.json").read_bytes().startswith(b'{\n"format": 1,')


@pytest.mark.parametrize(
    ("frozen", "what"),
    [
        (("model.nowhere",), "no tensor of that name"),
        (("model.layers.0",), "requires a gradient"),
        ("model", "give a collection"),
        (("optimizer",), "no tensor of that name"),
        (("model.norm",), "no tensor of that name"),  # buffers are never frozen
    ],
)
def test_what_cannot_be_frozen_is_refused(tmp_path: Path, frozen: Any, what: str) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(InvalidStateError, match=what):
            checkpoints.save(1, tuning(), frozen=frozen)
        assert checkpoints.steps() == []


def test_a_promise_that_is_broken_during_the_save_fails_it(tmp_path: Path) -> None:
    state = {"base": torch.zeros(1000)}

    class Breaking(LocalStorage):
        def make_folder(self, prefix: str, *, exist_ok: bool = False) -> None:
            if prefix.startswith(BLOBS):  # summed up by now, and not yet written
                state["base"][500] = 1
            super().make_folder(prefix, exist_ok=exist_ok)

    with sc.CheckpointManager(Breaking(tmp_path)) as checkpoints:
        with pytest.raises(CheckpointSaveError, match=r"changed between `save` and their writing: base"):
            checkpoints.save(1, state, frozen=("base",)).result()
        assert checkpoints.steps() == []
        assert checkpoints.save(1, state, frozen=("base",)).result().step == 1
    assert len(blobs(LocalStorage(tmp_path))) == 1


@pytest.mark.parametrize("staging", ["none", "blocking"])
def test_other_ways_of_staging(tmp_path: Path, staging: Any) -> None:
    policy = sc.SavePolicy(staging=staging, verify_copies=True)
    state = tuning()
    with sc.CheckpointManager(tmp_path, saving=policy) as checkpoints:
        checkpoints.save(1, state, frozen=FROZEN).result()
        saved = content(state)
        other = tuning(seed=3)
        checkpoints.load(1, other, policy=sc.LoadPolicy(in_place=True))
    assert same(saved, content(other) | {k: v for k, v in saved.items() if k[0].isdigit()})


def test_a_damaged_base_is_found_and_not_referred_to_again(place: Callable[[], Storage]) -> None:
    storage, state = place(), tuning()
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, state, frozen=FROZEN)
        checkpoints.save(2, state, frozen=FROZEN)
    (base,) = blobs(storage)
    good = storage.read(base)
    storage.replace(base, good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    reports = verify(storage).steps
    assert [report.verdict for report in reports] == ["DAMAGED"] * 2
    assert all("model." in str(problem) for report in reports for problem in report.problems)
    assert reports[0].checked_nbytes > storage.size(base) > reports[1].checked_nbytes  # it is read once
    with sc.CheckpointManager(storage) as checkpoints:
        with pytest.raises(CheckpointDamagedError):
            checkpoints.load(2, tuning(seed=1))
        checkpoints.save(3, state, frozen=FROZEN)
    assert [report.verdict for report in verify(storage).steps] == ["DAMAGED", "DAMAGED", "COMPLETE"]
    storage.delete([base])
    problems = [str(problem) for problem in verify(storage, step=1, quick=True).steps[0].problems]
    assert problems == [f"{Catalog(storage).record(1)[1].files[0].name}: is missing: {base}"]
    with sc.CheckpointManager(storage) as checkpoints:
        with pytest.raises(CheckpointDamagedError, match=r"blobs/.* is missing"):
            checkpoints.load(2, tuning(seed=1))
        assert checkpoints.resume(tuning(seed=1)) is not None
