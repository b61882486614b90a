"""A replicated object store loses parts of itself in the middle of a save: it is committed or fails, and what was
committed before and afterwards loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.storage import RetryPolicy, S3Storage, Transfers
from shardckpt.storage.base import Buffer, PutPart, Storage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.gangs import run_ranks
from shardckpt.testing.servers import cluster, seaweed
from shardckpt.testing.servers.cluster import Cluster
from tests.run.making import is_whole, walk
from tests.storage.s3server import S3Server, need_seaweedfs

pytestmark = [pytest.mark.s3, pytest.mark.crash]

MiB = 1 << 20
SOON = RetryPolicy(tries=5, deadline=timedelta(seconds=5))


@pytest.fixture
def parts() -> Iterator[Cluster]:
    need_seaweedfs()
    with cluster.running() as running:
        yield running


class Losing(StorageWrapper):
    """Calls `lose` once, when half of what this rank puts of a shared object is on its way."""

    def __init__(self, inner: Storage, lose: Callable[[], None]) -> None:
        super().__init__(inner)
        self._due = [lose]

    def put_parts(self, key: str, upload: str, parts: Iterable[Buffer], **terms: Any) -> tuple[PutPart, ...]:
        whole = memoryview(b"".join(parts))
        put: tuple[PutPart, ...] = self.inner.put_parts(  # type: ignore[attr-defined]
            key, upload, self._halves(whole), **{**terms, "nbytes": len(whole)}
        )
        return put

    def _halves(self, whole: memoryview) -> Iterator[Buffer]:
        yield whole[: len(whole) // 2]
        while self._due:
            self._due.pop()()
        yield whole[len(whole) // 2 :]


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.arange(8 * MiB, dtype=torch.float32) + step}


def place(server: seaweed.ObjectServer) -> S3Storage:
    client = S3Server(server.endpoint, server.bucket, server.access_key, server.secret_key)
    few = Transfers(whole_nbytes=5 * MiB, part_nbytes=5 * MiB, concurrency=2)
    return client.storage(f"s3://{server.bucket}/run", transfers=few, retries=SOON)


def save(step: int, places: list[Storage]) -> bool:
    """Two ranks put one file together, each through a gateway of its own. Whether all hear that it is committed; else
    all have heard that it failed."""

    def on_rank(gangs: sc.Gangs) -> str:
        with sc.CheckpointManager(places[gangs.root.rank], gangs) as manager:
            try:
                manager.save(step, state_of(step), replicated="*").result()
            except sc.CheckpointSaveError as error:
                return str(error)
            return ""

    first, second = run_ranks(2, on_rank)
    assert bool(first) == bool(second), (first, second)
    return not first


def check_all(storage: S3Storage, steps: list[int]) -> None:
    assert Catalog(storage).steps() == steps
    with sc.CheckpointManager(storage) as manager:
        for step in steps:
            assert is_whole(storage, step)
            loaded = {"weights": torch.zeros(8 * MiB)}
            manager.load(step, loaded)
            assert torch.equal(loaded["weights"], state_of(step)["weights"])


def check_only(storage: S3Storage, steps: list[int]) -> None:
    """These are there, and nothing is left of anything else."""
    check_all(storage, steps)
    assert storage.list_uploads() == []
    assert len([key for key in walk(storage) if not key.endswith(("manifest.json", "/"))]) == len(steps)


@pytest.mark.larger
def test_a_volume_server_is_lost_in_the_middle_of_a_save(parts: Cluster) -> None:
    one, other = map(place, parts.gateways)
    assert save(1, [one, other])
    steps = [1]

    if save(2, [one, Losing(other, lambda: parts.lose_volume_server(0))]):
        steps.append(2)
    check_all(other, steps)
    assert save(3, [one, other])  # with the two that are left
    check_only(one, [*steps, 3])


def test_a_volume_server_and_a_gateway_are_lost_in_the_middle_of_a_save(parts: Cluster) -> None:
    one, other = map(place, parts.gateways)
    assert save(1, [one, other])

    def lose() -> None:
        parts.lose_volume_server(0)
        parts.lose_gateway(1)

    # The client of a rank knows one gateway: without that, the save fails, and nothing of it counts.
    assert not save(2, [one, Losing(other, lose)])
    check_all(one, [1])
    assert save(2, [one, one])
    check_only(one, [1, 2])
