"""A path that is mounted on both nodes, but not from the same place: found out before anything is lost."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from tests.faults.gangwork import blank_state, make_state, same
from tests.faults.nodes import with_own_mounts

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

RANKS = 2
LIMIT = timedelta(seconds=20)


def as_two_nodes(rank: int, size: int, folder: Path, root: Path, disks: tuple[Any, Any], looks: bool) -> Any:
    """Rank 1 is on another node. The state that it gets, or what is raised."""
    fresh, read_only = disks
    return with_own_mounts(lambda: a_life(rank, root, looks), fresh=fresh if rank else None, read_only=read_only)


def by_dcp(rank: int, size: int, folder: Path, root: Path) -> Any:
    def save() -> str:
        try:
            dcp.save({"model": make_state(rank, 1)["model"]}, storage_writer=sc.DcpWriter(root / "step_1"))
        except BaseException as error:  # DCP's own is not an Exception
            return str(error)
        return "saved"

    return with_own_mounts(save, fresh=root if rank else None)


def a_life(rank: int, root: Path, looks: bool) -> Any:
    gangs, state = sc.Gangs.from_env(), blank_state(rank)
    try:
        with sc.CheckpointManager(root, gangs, timeout=LIMIT) as checkpoints:
            if looks and checkpoints.resume(state):
                return same(state, make_state(rank, 1))
            checkpoints.save(1, make_state(rank, 1)).result()
    except sc.CheckpointError as error:
        return type(error).__name__, str(error)
    finally:
        gangs.close()
    return "saved"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    try:
        with_own_mounts(lambda: None, fresh=tmp_path)
    except OSError as error:
        pytest.skip(f"no mounts of one's own here: {error}")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("looks", [True, False])
def test_a_disk_of_each_node(ranks: ProcessPool, root: Path, looks: bool) -> None:
    told = ranks.run(RANKS, as_two_nodes, root, (root, None), looks)
    kind = "RootNotSharedError" if looks else "CheckpointSaveError"
    assert [name for name, _ in told] == [kind] * RANKS
    for _, text in told:
        assert "rank 1 (on " in text if looks else "rank 1: RootNotSharedError" in text
    assert list(root.iterdir()) == []


def test_mounts_of_their_own_that_show_the_same_and_then_are_read_only(ranks: ProcessPool, root: Path) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    assert ranks.run(RANKS, as_two_nodes, root, (elsewhere, None), True) == ["saved"] * RANKS
    assert [entry.name for entry in root.iterdir()] == ["step_1"]
    assert ranks.run(RANKS, as_two_nodes, root, (elsewhere, root), True) == [True] * RANKS
    told = ranks.run(RANKS, as_two_nodes, root, (root, root), True)
    assert [name for name, _ in told] == ["RootNotSharedError"] * RANKS


def test_dcp_with_our_writer(ranks: ProcessPool, root: Path) -> None:
    for text in ranks.run(RANKS, by_dcp, root):
        assert "rank 1: RootNotSharedError: what rank 0 has made in" in text
    assert list(root.iterdir()) == []
