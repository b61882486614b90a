"""What ranks put together on S3 is sent by their writer processes: the same bytes, errors and counts; and when one of
them dies in the middle, the step is absent and the next commits."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from threading import Barrier
from typing import Any, NoReturn

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.writing import child
from shardckpt.engine.writing.shared import SharedMap
from shardckpt.format.layout import MANIFEST
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import PutPart, SharedPuts
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.objects import requests
from shardckpt.storage.transfer import pacing
from shardckpt.testing.gangs import run_ranks
from tests.engine.writing.test_writer_process import LIMIT_S, OTHER, until, writer_of
from tests.storage import proxy, s3server
from tests.storage.proxy import Harm, Proxy
from tests.storage.s3server import S3Server

pytestmark = [
    pytest.mark.s3,
    pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps"),
]

VALUES = 5 << 20
"""Of four bytes: each of two ranks has 10 MiB to put, which are two parts of an upload."""
FIRST = "partNumber=1"
"""Ends the request of the first part of the stretch of rank 1; that of rank 0 comes after it."""


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[Proxy, S3Server]]:
    """A real object store, and the proxy through which it is seen."""
    s3server.need_seaweedfs()
    with s3server.seaweedfs() as server, proxy.before(server.endpoint) as watching:
        yield watching, S3Server(watching.endpoint, server.bucket, server.access_key, server.secret_key)


@pytest.fixture
def seen(wire: tuple[Proxy, S3Server]) -> Proxy:
    wire[0].heal()
    return wire[0]


@pytest.fixture
def server(wire: tuple[Proxy, S3Server]) -> S3Server:
    return wire[1]


@pytest.fixture
def url(server: S3Server) -> str:
    return f"s3://{server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def no_parts_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are threads of this process, which fails if it sends a part itself."""

    def put_part(*what: object) -> NoReturn:
        raise AssertionError("the training process sends a part")

    monkeypatch.setattr(requests, "put_part", put_part)


def manager(server: S3Server, url: str, gangs: sc.Gangs, manners: sc.Manners | None) -> sc.CheckpointManager:
    return sc.CheckpointManager(url, gangs, manners=manners, storage_options=dict(server.options))


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.arange(VALUES, dtype=torch.float32) * step}}


def is_loaded(checkpoints: sc.CheckpointManager, step: int) -> bool:
    found = {"model": {"weight": torch.zeros(VALUES)}}
    checkpoints.load(step, found)
    return torch.equal(found["model"]["weight"], state(step)["model"]["weight"])


def files_of(server: S3Server, url: str, step: int) -> dict[str, bytes]:
    storage = server.storage(url)
    folder, record = Catalog(storage).record(step)
    return {file.name.rpartition("/")[2]: storage.read(f"{folder}/{file.name}") for file in record.files}


def parts_of(seen: Proxy) -> list[str]:
    """The requests so far that put a part of the file."""
    return [request.path for request in seen.seen if request.kind == "part" and "/model.pt?" in request.path]


@pytest.fixture
def as_threads_write(server: S3Server) -> dict[str, bytes]:
    """The files of step 1, put by this process."""
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"

    def act(gangs: sc.Gangs) -> None:
        with manager(server, url, gangs, None) as checkpoints:
            checkpoints.save(1, state(1), replicated="*").result()

    run_ranks(2, act)
    return files_of(server, url, 1)


def test_each_rank_has_its_part_sent_and_the_bytes_are_the_same(
    seen: Proxy, server: S3Server, url: str, as_threads_write: dict[str, bytes], no_parts_from_here: None
) -> None:
    def act(gangs: sc.Gangs) -> tuple[int | None, bool]:
        with manager(server, url, gangs, OTHER) as checkpoints:
            assert isinstance(checkpoints._written, SharedPuts)
            checkpoints.save(1, state(1), replicated="*").result()
            return writer_of(checkpoints).pid, is_loaded(checkpoints, 1)

    seen.heal()
    told = run_ranks(2, act)
    assert [loaded for _, loaded in told] == [True, True]
    assert len({pid for pid, _ in told} - {None, os.getpid()}) == 2
    assert len(parts_of(seen)) == 4
    assert files_of(server, url, 1) == as_threads_write
    assert server.storage(url).list_uploads() == []


def test_tries_are_counted_and_errors_told_as_if_they_were_of_this_process(
    seen: Proxy, server: S3Server, url: str, no_parts_from_here: None
) -> None:
    together = Barrier(2)

    def act(gangs: sc.Gangs) -> tuple[list[int], str]:
        rank = gangs.root.rank
        with manager(server, url, gangs, OTHER) as checkpoints:
            retries = []
            for step, slow_downs in ((1, 3), (2, 0)):
                if rank == 0:
                    seen.harm(Harm.SLOW_DOWN, "part", key="/model.pt", times=slow_downs)
                together.wait(LIMIT_S)
                pending = checkpoints.save(step, state(step), replicated="*")
                pending.result()
                retries.append(pending.report.retries)
                together.wait(LIMIT_S)
            pid = writer_of(checkpoints).pid
            if rank == 0:
                seen.harm(Harm.DENIED, "part", key=FIRST)
            together.wait(LIMIT_S)
            with pytest.raises(sc.CheckpointSaveError) as caught:
                checkpoints.save(3, state(3), replicated="*").result()
            checkpoints.save(4, state(4), replicated="*").result()
            assert checkpoints.steps() == [1, 2, 4]
            assert is_loaded(checkpoints, 4)
            assert writer_of(checkpoints).pid == pid
            return retries, str(caught.value)

    told = run_ranks(2, act)
    assert sum(retries[0] for retries, _ in told) == 3
    assert [retries[1] for retries, _ in told] == [0, 0]
    assert all("rank 1: PermissionError" in said and "access was refused" in said for _, said in told)
    assert server.storage(url).list_uploads() == []


@pytest.mark.crash
@pytest.mark.parametrize("how", ["killed", "cancelled"])
@pytest.mark.sampled(2)
def test_in_the_middle_of_the_parts(
    seen: Proxy, server: S3Server, url: str, no_parts_from_here: None, how: str
) -> None:
    """Rank 1 has sent its first part, and waits for the answer."""
    seen.harm(Harm.LATE, "part", key=FIRST)

    def act(gangs: sc.Gangs) -> str:
        rank = gangs.root.rank
        with manager(server, url, gangs, OTHER) as checkpoints:
            pending = checkpoints.save(1, state(1), replicated="*")
            if rank == 1:
                until(lambda: [path for path in parts_of(seen) if path.endswith(FIRST)])
                victim = writer_of(checkpoints).pid
                assert victim is not None
                if how == "killed":
                    os.kill(victim, signal.SIGKILL)
                else:
                    pending.cancel()
            with pytest.raises(sc.CheckpointSaveError) as caught:
                pending.result()
            assert checkpoints.steps() == []
            checkpoints.save(2, state(2), replicated="*").result()
            assert checkpoints.steps() == [2]
            assert is_loaded(checkpoints, 2)
            if rank == 1:
                assert writer_of(checkpoints).pid != victim
            return str(caught.value)

    said = "rank 1: OSError: cannot write" if how == "killed" else "cancelled"
    assert all(said in message for message in run_ranks(2, act))
    storage = server.storage(url)
    assert storage.list_uploads() == []
    assert storage.list() == ["step_2/"]
    assert MANIFEST in storage.list("step_2")


@pytest.mark.parametrize(
    ("verb", "terms", "place"),
    [
        ("put", {}, MemoryObjects),
        ("put_range", {"offset": 0}, MemoryStorage),
        ("put_parts", {"numbers": [1, 10]}, MemoryObjects),
    ],
)
def test_each_verb_goes_out_at_the_rate(
    monkeypatch: pytest.MonkeyPatch, verb: str, terms: dict[str, Any], place: type[MemoryObjects | MemoryStorage]
) -> None:
    """What the other process does, done here, by a clock that moves only while somebody waits."""
    waited: list[float] = []
    monkeypatch.setattr(pacing, "_now", lambda: sum(waited))
    monkeypatch.setattr(pacing, "_sleep", waited.append)
    storage = place()
    monkeypatch.setattr(child, "open_storage", lambda *told, **options: storage)
    writer = child._Writer({"root": "", "options": {}, "manners": {"rate": 1e6}})
    image = SharedMap(1_000_000)
    image[:] = os.urandom(len(image))
    writer.map(7, os.dup(image.file), len(image))
    if isinstance(storage, MemoryObjects):
        upload = storage.begin_upload("a")
        terms = {**terms, "upload": upload} if verb == "put_parts" else terms
    told = {"verb": verb, "key": "a", "parts": [(7, 0, 400_000), (7, 400_000, len(image))], "living": [7]}
    answer = writer.do({**told, "terms": terms})
    assert sum(waited) == pytest.approx(len(image) / 1e6, rel=0.15)
    if verb == "put_parts":
        storage.finish_upload("a", upload, [PutPart(*part) for part in answer["put"]])
    assert storage.read("a") == image[:]
