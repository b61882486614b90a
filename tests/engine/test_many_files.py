"""A step whose record has its files in columns, from save to deletion: nobody minds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.format.record import columns
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.gangs import RanksError, run_ranks
from shardckpt.tools.verify import verify

RANKS = 4


@pytest.fixture(autouse=True)
def two_are_many() -> Iterator[None]:
    before, columns.MANY = columns.MANY, 2
    yield
    columns.MANY = before


def state_of(number: float) -> dict[str, Any]:
    """Alike on all ranks, but for a tensor and a value of each."""
    weight = torch.full((3, 5), 7.0)
    return {"model": {"weight": weight}, "own": torch.full((4,), float(number)), "seen": {"samples": int(number)}}


def save_all(root: str | Storage, step: int, ranks: int = RANKS) -> None:
    def act(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(root, gangs, keep=sc.KeepLast(2)) as manager:
            manager.save(step, state_of(100 * step + gangs.root.rank)).result()

    run_ranks(ranks, act)


@pytest.mark.parametrize("kind", [MemoryObjects, MemoryStorage])
def test_from_save_to_deletion(kind: type[Storage]) -> None:
    root = kind()
    for step in (1, 2, 3):
        save_all(root, step)
    content = json.loads(root.read("step_3/manifest.json"))
    assert content["format"] == 3
    assert [family["kind"] for family in content["files"]["families"]] == ["rank"]

    def same(gangs: sc.Gangs) -> tuple[float, int]:
        state = state_of(0)
        with sc.CheckpointManager(root, gangs) as manager:
            assert manager.steps() == [2, 3], "the first was deleted"
            manager.load(3, state)
        assert torch.equal(state["model"]["weight"], torch.full((3, 5), 7.0))
        return state["own"][0].item(), state["seen"]["samples"]

    assert run_ranks(RANKS, same) == [(300.0 + rank, 300 + rank) for rank in range(RANKS)]

    def fewer(gangs: sc.Gangs) -> int:
        state = state_of(0)
        policy = sc.LoadPolicy(new_world={"own": "own", "seen": "own"})
        with sc.CheckpointManager(root, gangs) as manager:
            plan = manager.plan(3, state, policy=policy)
            assert sum(file.nbytes for reads in plan.ranks for file in reads.files) == 2 * (60 + 16)
            manager.load(3, state, policy=policy)
        return int(state["seen"]["samples"])

    assert run_ranks(2, fewer) == [300, 301]


def test_damage_is_found(tmp_path: Path) -> None:
    save_all(str(tmp_path), 1)
    assert verdicts(tmp_path) == ["PARTIAL"], "there is no optimizer in it"
    broken = tmp_path / "step_1" / "rank_2.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 3] ^= 1
    broken.write_bytes(content)
    assert verdicts(tmp_path) == ["DAMAGED"]
    broken.unlink()

    def load(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(str(tmp_path), gangs) as manager:
            manager.load(1, state_of(0))

    with pytest.raises(RanksError, match=r"rank_2\.pt is missing"):
        run_ranks(RANKS, load)


def verdicts(root: Path) -> list[str]:
    return [step.verdict for step in verify(root).steps]
