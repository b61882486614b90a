"""A process that was stopped in the middle of a save on S3 goes on when another job has long saved the step: it harms
nothing, and what it leaves is swept when it is old, ours and uncommitted."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.format.layout import MANIFEST
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.objects.probe import is_probe
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.pool import ProcessPool
from tests.distributed.test_object_jobs import PART, keys_of, storage_of, sweep
from tests.run.making import is_whole, walk
from tests.storage.s3server import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.crash]

STEP = 7


@dataclass(frozen=True)
class Stop:
    """Where the process stops: the rank, and the key that ends so is put or replaced."""

    rank: int
    key: str
    replaces: bool = False
    """Whether the step was committed once before."""

    def __str__(self) -> str:
        return f"{'replacing' if self.replaces else 'putting'}_{self.key}"


class Stopping(StorageWrapper):
    """Stops its process, once, as SIGSTOP, a frozen cgroup or a machine that hangs do it."""

    def __init__(self, inner: Storage, stop: Stop, folder: Path) -> None:
        super().__init__(inner)
        self._stop, self._told = stop, folder / "stopped"

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        if key.endswith(MANIFEST):
            self._stop_if_due(key)
        return super().put(key, self._stop_half_way(key, parts) if key.endswith(".pt") else parts)

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        self._stop_if_due(key)
        self.inner.swap(key, old, new)  # type: ignore[attr-defined]

    def _stop_half_way(self, key: str, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        whole = memoryview(b"".join(parts))
        yield whole[: 2 * PART]
        self._stop_if_due(key)
        yield whole[2 * PART :]

    def _stop_if_due(self, key: str) -> None:
        if key.startswith(f"step_{STEP}/") and key.endswith(self._stop.key) and not self._told.exists():
            self._told.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)


def state_of(number: int, rank: int) -> dict[str, object]:
    return {"weights": torch.full((11 << 18,), 10.0 * number + rank), "number": number}


def save_late_or_again(
    rank: int, world_size: int, folder: Path, server: S3Server, url: str, stop: Stop
) -> tuple[str, str]:
    """Two ranks, of which one stops; the other then saves the step again, as a new job, and has it go on.

    Gives (how the save ended here, the attempt that this process has committed)."""
    storage, gangs = storage_of(server, url), sc.Gangs.from_env()
    late = rank == stop.rank
    with sc.CheckpointManager(storage, gangs) as manager:
        if stop.replaces:
            manager.save(STEP, state_of(1, rank)).result()
    ended = "committed"
    place = Stopping(storage, stop, folder) if late else storage
    with suppress(sc.CheckpointError), sc.CheckpointManager(place, gangs, timeout=timedelta(seconds=5)) as manager:
        try:
            manager.save(STEP, state_of(2, rank)).result()
        except sc.CheckpointError as error:
            ended = type(error).__name__
    if late:
        return ended, ""
    with sc.CheckpointManager(storage, sc.Gangs.local()) as manager:
        manager.save(STEP, state_of(3, rank)).result()
    committed = Catalog(storage).record(STEP)[1].attempt
    os.kill(int((folder / "stopped").read_text()), signal.SIGCONT)
    return ended, committed


@pytest.mark.parametrize("stop", [Stop(1, "rank_1.pt"), Stop(0, MANIFEST), Stop(0, MANIFEST, replaces=True)], ids=str)
@pytest.mark.sampled(2)
def test_a_process_that_wakes_up_when_the_step_was_saved_again(
    server: S3Server, ranks: ProcessPool, tmp_path: Path, stop: Stop
) -> None:
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    storage = storage_of(server, url)
    storage.put(f"step_{STEP}/notes/of a person.txt", [b"mine"])
    foreign = storage.begin_upload("elsewhere/large")
    outcomes = ranks.run(2, save_late_or_again, replace(server), url, stop, timeout=60)
    ended, committed = outcomes[1 - stop.rank]
    assert ended in ("CheckpointSaveError", "CommitUnknownError")
    assert outcomes[stop.rank][0] in ("CheckpointSaveError", "CommitUnknownError")

    assert Catalog(storage).steps() == [STEP]
    assert Catalog(storage).record(STEP)[1].attempt == committed
    assert is_whole(storage, STEP)
    loaded = state_of(0, 0)
    with sc.CheckpointManager(storage) as manager:
        manager.load(STEP, loaded)
    expected = state_of(3, 1 - stop.rank)
    assert loaded["number"] == 3
    assert torch.equal(*(state["weights"] for state in (loaded, expected)))  # type: ignore[arg-type]

    # A probe that the late one is about to remove is no leftover yet.
    deadline = time.monotonic() + 20
    while any(map(is_probe, walk(storage))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(committed not in folder for folder in sweep(storage))
    assert set(walk(storage)) == {*keys_of(storage, STEP), f"step_{STEP}/notes/of a person.txt"}
    assert storage.list_uploads() == [("elsewhere/large", foreign.replace(foreign.partition("/")[0], "", 1))]
    storage.abort_upload("elsewhere/large", foreign)
