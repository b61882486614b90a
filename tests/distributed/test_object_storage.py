"""What a job meets on S3, beside a real server: several writers of one object, faults on the way, a late writer."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import S3Storage, Transfers
from shardckpt.storage.base import Buffer
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.gangs import run_ranks
from tests.distributed.test_sharing import save_alike
from tests.storage import proxy
from tests.storage.proxy import Harm
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.s3

LIMIT = timedelta(seconds=60)
"""Nothing here may hang for so long."""


def small_parts(server: S3Server, url: str, **options: Any) -> S3Storage:
    return server.storage(url, transfers=Transfers(whole_nbytes=5 << 20, part_nbytes=5 << 20), **options)


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
@pytest.mark.parametrize("client", ["s3fs", "direct"])
def test_faults_on_the_way_are_counted_in_the_report_and_tear_nothing(server: S3Server, client: str) -> None:
    place = f"{server.bucket}/{uuid.uuid4().hex}"
    with proxy.before(server.endpoint) as harmful:
        through = S3Server(harmful.endpoint, server.bucket, server.access_key, server.secret_key)
        storage = small_parts(through, f"s3://{place}", client=client)
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
            harmful.harm(Harm.TRUNCATED, "get", key="rank_0", times=2)
            loaded = {"weights": torch.zeros(5 << 20)}
            manager.load(2, loaded)
            assert torch.equal(loaded["weights"], state["weights"])
        assert storage.list_uploads() == []


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
@pytest.mark.parametrize("client", ["s3fs", "direct"])
def test_answers_that_come_too_late_are_asked_for_again(server: S3Server, client: str) -> None:
    """By a client that waits for a second: parts, their end, the record and ranges that were done but not answered."""
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    state = {"weights": torch.arange(5 << 20, dtype=torch.float32)}
    with proxy.before(server.endpoint) as harmful:
        options = {**server.options, "endpoint_url": harmful.endpoint, "config_kwargs": {"read_timeout": 1}}
        with sc.CheckpointManager(url, storage_options={**options, "client": client}) as manager:
            manager.save(1, state).result()
            for kind in ("create_upload", "part", "complete", "put"):
                harmful.harm(Harm.LATE, kind, key="step_2")
            save = manager.save(2, state)
            save.result(LIMIT)
            assert save.report.retries >= 4
            harmful.harm(Harm.LATE, "get", key="rank_0", times=2)
            loaded = {"weights": torch.zeros(5 << 20)}
            manager.load(2, loaded)
            assert torch.equal(loaded["weights"], state["weights"])
            assert manager.steps() == [1, 2]


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
@pytest.mark.parametrize(
    ("harm", "advice"),
    [
        (Harm.EXPIRED, r"check the credentials \(have they expired\?\)"),
        (Harm.DENIED, r"check the credentials \(have they expired\?\)"),
        (Harm.FULL, "the store is full: free space"),
        (Harm.QUOTA, "the quota of the bucket or the account is used up: free space"),
    ],
    ids=["expired", "read-only", "full", "over quota"],
)
def test_a_refused_save_says_what_to_do_and_leaves_the_step_before(server: S3Server, harm: Harm, advice: str) -> None:
    """Credentials that have expired, a bucket that may be read only, or is full: no try is repeated, and the old step
    loads."""
    place = f"{server.bucket}/{uuid.uuid4().hex}"
    with proxy.before(server.endpoint) as harmful:
        through = S3Server(harmful.endpoint, server.bucket, server.access_key, server.secret_key)
        state = {"weights": torch.arange(3 << 20, dtype=torch.float32)}
        with sc.CheckpointManager(small_parts(through, f"s3://{place}")) as manager:
            manager.save(1, state).result()
            harmful.harm(harm, "put", "create_upload", "part", "complete", "delete_objects", "delete", times=1000)
            save = manager.save(2, {"weights": torch.zeros(3 << 20)})
            with pytest.raises(sc.CheckpointSaveError, match=advice):
                save.result(LIMIT)
            assert save.report.retries == 0
            assert manager.steps() == [1]
            loaded = {"weights": torch.zeros(3 << 20)}
            manager.load(1, loaded)
            assert torch.equal(loaded["weights"], state["weights"])
            harmful.heal()
            manager.save(2, state).result()
            assert manager.steps() == [1, 2]


def test_a_wrong_bucket_is_named_by_save_and_load(server: S3Server) -> None:
    with sc.CheckpointManager("s3://no-such-bucket/runs", storage_options=dict(server.options)) as manager:
        for call in (
            lambda: manager.save(1, {"weights": torch.zeros(5 << 20)}).result(LIMIT),
            lambda: manager.load(1, {"weights": torch.zeros(5 << 20)}),
        ):
            with pytest.raises(sc.CheckpointError, match=r"s3://no-such-bucket/runs"):
                call()


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
