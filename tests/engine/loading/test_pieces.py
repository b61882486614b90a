"""Who shares the work of a load: threads where there are processors for them, and none beside a rank's own else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.loading.fetching import pieces
from shardckpt.storage import LocalStorage
from shardckpt.storage.memory import MemoryStorage


@pytest.mark.parametrize(("ranks", "processors", "threads"), [("", 1, 2), ("2", 2, 2), ("3", 2, 1), ("8", 96, 2)])
def test_a_rank_without_a_processor_of_its_own_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, ranks: str, processors: int, threads: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(pieces, "processors", lambda: processors)
    assert pieces.threads() == threads


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("of_disk", [False, True])
def test_a_load_keeps_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_disk: bool, in_place: bool) -> None:
    storage = LocalStorage(tmp_path) if of_disk else MemoryStorage()
    started: list[str] = []
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        started.append(self.name)
        real(self)

    state = {f"t{number}": torch.full((pieces.PIECE // 8,), float(number)) for number in range(6)}  # of 8 MiB each
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, state).result()
        monkeypatch.setattr(threading.Thread, "start", start)
        crews = []
        for ranks in ("1", "1000"):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
            started.clear()
            for tensor in state.values():
                tensor.zero_()
            checkpoints.load(1, state, policy=sc.LoadPolicy(in_place=in_place))
            assert [tensor[-1].item() for tensor in state.values()] == list(map(float, range(6)))
            crews.append(sum(name.startswith("shardckpt-io-") for name in started))
    assert crews[0] >= 2
    assert crews[1] == 0
