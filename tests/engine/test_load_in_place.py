"""Loading straight into the state: the same result in one pass, and never a word less when it goes wrong."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.loading.fetching.straight import Straight
from shardckpt.storage import LocalStorage, MemoryStorage, Storage
from shardckpt.testing.gangs import run_ranks
from tests.engine.states import assert_same, snapshot, train, training

IN_PLACE = sc.LoadPolicy(in_place=True)


def make(storage: Storage) -> list[dict[str, Any]]:
    """Steps 1 and 2, and what the state was then."""
    state = training()
    snapshots = []
    with sc.CheckpointManager(storage) as checkpoints:
        for step in (1, 2):
            train(state, 1)
            checkpoints.save(step, state).result()
            snapshots.append(snapshot(state))
    return snapshots


def other() -> dict[str, Any]:
    """A state of the same shape with other content."""
    state = training(seed=4)
    train(state, 1)
    return state


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_result_is_the_same(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from a file system the tensors come by `stream`, into the memory that they have, seen by autograd."""
    storage = LocalStorage(tmp_path) if kind == "disk" else MemoryStorage()
    saved, state = make(storage)[1], other()
    weight = state["model"].body.weight
    address, version = weight.data_ptr(), weight._version
    streamed: list[int] = []
    plain = Straight._stream
    monkeypatch.setattr(Straight, "_stream", lambda self: (streamed.append(len(self._places)), plain(self))[1])
    with sc.CheckpointManager(storage) as checkpoints:
        assert checkpoints.load(2, state, policy=IN_PLACE).step == 2
    assert_same(saved, snapshot(state))
    assert state["model"].body.weight.data_ptr() == address
    assert weight._version > version
    assert (sum(streamed) > 10) == (kind == "disk")


def test_every_damaged_byte_is_found_and_told(tmp_path: Path) -> None:
    """Around the tensors nothing has changed by then; in them the error says that the state has."""
    make(LocalStorage(tmp_path))
    file = tmp_path / "step_2" / "model.pt"
    good, rng = file.read_bytes(), random.Random(0)
    seen = set()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        for position in [0, 64, len(good) - 1, *rng.sample(range(len(good)), 20)]:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            state = other()
            before = snapshot(state)
            with pytest.raises(sc.CheckpointDamagedError) as caught:
                checkpoints.load(2, state, policy=IN_PLACE)
            changed = caught.value.state_changed
            seen.add(changed)
            assert ("do not go on with it" if changed else "was not loaded") in str(caught.value)
            if not changed:
                assert_same(before, snapshot(state))
    assert seen == {True, False}


def flip(file: Path) -> None:
    """A byte in the middle, which is one of a tensor."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_resume_goes_back_to_a_whole_step(tmp_path: Path) -> None:
    saved, state = make(LocalStorage(tmp_path))[0], other()
    flip(tmp_path / "step_2" / "model.pt")
    with sc.CheckpointManager(tmp_path) as checkpoints:
        info = checkpoints.resume(state, policy=IN_PLACE)
    assert info is not None
    assert info.step == 1
    assert [step for step, _ in info.skipped] == [2]
    assert_same(saved, snapshot(state))


def test_no_fresh_start_with_a_state_that_was_touched(tmp_path: Path) -> None:
    """Checked first, it may be had: then the state is as it was."""
    make(LocalStorage(tmp_path))
    for step in (1, 2):
        flip(tmp_path / f"step_{step}" / "model.pt")
    state = other()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.resume(state, allow_fresh_start=True) is None
        with pytest.raises(sc.CheckpointLoadError, match="hold bytes of a damaged step: start the program again"):
            checkpoints.resume(state, policy=IN_PLACE, allow_fresh_start=True)


@pytest.mark.parametrize("kind", ["missing", "shape", "dtype"])
def test_nothing_can_be_kept_of_a_state_that_may_be_lost(kind: str) -> None:
    with pytest.raises(ValueError, match="in_place=True"):
        sc.LoadPolicy(in_place=True, **{kind: "keep"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)])
def test_memory_that_two_tensors_share_in_the_state_but_not_in_the_file(tmp_path: Path, one: int, other: int) -> None:
    """What is copied later wins, as it does when all is copied; the bytes of the first are no damage."""
    shared = torch.zeros(4000)  # few bytes: one call reads both
    views = [shared, shared[2000:3000], shared[1000:]]
    state = {"a": views[one], "b": views[other]}
    saved = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, saved).result()
        checkpoints.load(1, state, policy=IN_PLACE)
    assert torch.equal(state["b"], saved["b"])


def test_a_cast_and_a_strided_place(tmp_path: Path) -> None:
    first, second = torch.randn(300, 300), torch.randn(300, 300)
    wide, strided = torch.zeros(300, 300, dtype=torch.float64), torch.zeros(300, 600)[:, ::2]
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": first, "b": second}).result()
        checkpoints.load(1, {"a": wide, "b": strided}, policy=sc.LoadPolicy(in_place=True, dtype="cast"))
    assert torch.equal(wide, first.double())
    assert torch.equal(strided, second)


def test_damage_that_one_rank_reads_is_damage_on_all(tmp_path: Path) -> None:
    def own(rank: int, step: int) -> dict[str, Any]:
        return {"own": {"t": torch.full((9000,), float(10 * step + rank))}}

    def save(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(tmp_path, gangs, timeout=timedelta(seconds=30)) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, own(gangs.root.rank, step)).result()

    def load(gangs: sc.Gangs) -> tuple[bool, int]:
        state = own(gangs.root.rank, 0)
        with sc.CheckpointManager(tmp_path, gangs, timeout=timedelta(seconds=30)) as checkpoints:
            with pytest.raises(sc.CheckpointDamagedError, match=r"rank_1\.pt") as caught:
                checkpoints.load(2, state, policy=IN_PLACE)
            info = checkpoints.resume(state, policy=IN_PLACE)
        assert info is not None
        assert torch.equal(state["own"]["t"], own(gangs.root.rank, 1)["own"]["t"])
        return caught.value.state_changed, info.step

    run_ranks(2, save)
    flip(tmp_path / "step_2" / "rank_1.pt")
    assert run_ranks(2, load) == [(True, 1)] * 2
