"""How many bytes go to and come from a real object store, counted in front of the server: the model of a DDP job is put
by all ranks and got once, and a load on another mesh gets what it needs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from tests.distributed.tensors import Grid, load, view_of
from tests.distributed.test_bytes_read import BOTH, FSDP, TP, model
from tests.distributed.test_sharing import Weighing
from tests.run.making import walk
from tests.storage import proxy
from tests.storage.proxy import Proxy
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.s3

MiB = 1 << 20


@pytest.fixture(scope="module")
def wire(server: S3Server) -> Iterator[tuple[Proxy, S3Server]]:
    """The proxy that counts, and the server as it is seen through it."""
    with proxy.before(server.endpoint) as counting:
        yield counting, S3Server(counting.endpoint, server.bucket, server.access_key, server.secret_key)


def replicated(seed: int) -> nn.Module:
    """36 MiB, wrapped as DDP does it: alike on all ranks."""
    torch.manual_seed(seed)
    return nn.parallel.DistributedDataParallel(nn.Linear(1024, 9 * 1024))


def save_alike(rank: int, world_size: int, folder: Path, server: S3Server, url: str) -> dict[str, int]:
    """The bytes that this rank has put, by file."""
    storage = Weighing(server.storage(url))
    with sc.CheckpointManager(storage, sc.Gangs.from_env()) as manager:
        manager.save(1, {"model": replicated(1)}).result()
    return storage.put_nbytes


def load_alike(rank: int, world_size: int, folder: Path, server: S3Server, url: str) -> bool:
    after, expected = replicated(2), replicated(1)
    with sc.CheckpointManager(url, sc.Gangs.from_env(), storage_options=dict(server.options)) as manager:
        manager.load(1, {"model": after})
    return all(torch.equal(*pair) for pair in zip(after.parameters(), expected.parameters(), strict=True))


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
def test_four_ranks_of_ddp_put_even_shares_and_get_each_byte_once(
    wire: tuple[Proxy, S3Server], ranks: ProcessPool
) -> None:
    counting, server = wire
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    shares = [put["model.pt"] for put in ranks.run(4, save_alike, server, url)]
    (key,) = [key for key in walk(server.storage(url)) if key.endswith("/model.pt")]
    nbytes = server.storage(url).size(key)
    assert sum(shares) == nbytes
    assert nbytes / 4 / 1.1 < min(shares) <= max(shares) < nbytes / 4 * 1.1

    counting.heal()
    assert ranks.run(4, load_alike, server, url) == [True] * 4
    (got,) = [count for path, count in counting.given.items() if path.endswith("/model.pt")]
    assert nbytes - MiB < got < nbytes + 4 * 64 * 1024  # each looks at the index by itself


def save_sharded(rank: int, world_size: int, folder: Path, server: S3Server, url: str) -> None:
    grid = Grid((4, 1))
    mesh = grid.mesh()
    tensors = {item.tensor.name: view_of(item.tensor.content(), item.split, mesh) for item in model(FSDP, grid)[:5]}
    with sc.CheckpointManager(server.storage(url), sc.Gangs.from_mesh(mesh)) as manager:
        manager.save(1, {"model": tensors}).result()


def load_sharded(
    rank: int, world_size: int, folder: Path, server: S3Server, url: str, how: str, grid: Grid
) -> tuple[list[str], int]:
    """(what is not as it was, the bytes that this rank needs)."""
    mesh, placed = grid.mesh(), model(how, grid)[:5]
    at = (tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))
    parts = [
        item.tensor.blank() if item.split is None else item.split.local(item.tensor.blank(), *at) for item in placed
    ]
    with sc.CheckpointManager(server.storage(url), sc.Gangs.from_mesh(mesh)) as manager:
        return load(manager, mesh, placed), sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
def test_a_load_on_another_mesh_gets_hardly_more_than_it_needs(
    wire: tuple[Proxy, S3Server], ranks: ProcessPool
) -> None:
    counting, server = wire
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    ranks.run(4, save_sharded, server, url)
    for how, grid in ((BOTH, Grid((2, 2))), (TP, Grid((1, 2)))):
        counting.heal()
        found = ranks.run(grid.ranks, load_sharded, server, url, how, grid)
        assert [wrong for wrong, _ in found] == [[]] * grid.ranks
        needed, got = sum(nbytes for _, nbytes in found), counting.given.total()
        print(f"{how} {grid.shape}: {got} bytes got, {needed} needed: {got / needed:.3f}")
        assert 0.5 * needed < got <= 1.05 * needed
