"""A store for the gangs' tests, in a process of its own, as torchrun's agent has one."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.testing.pool import ProcessPool


@pytest.fixture(scope="session")
def port(ranks: ProcessPool) -> Iterator[int]:
    """Where a TCPStore listens. (The pool comes first: it tells the server of processes what to import.)"""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=host, args=(theirs,), daemon=True)
    process.start()
    port: int = ours.recv()
    for rank in range(4):
        client(port, rank)
    yield port
    client.cache_clear()
    ours.close()
    theirs.close()
    process.join()


def host(connection: Connection) -> None:
    server = connect(0, is_master=True)
    connection.send(server.port)
    with connection:
        connection.poll(None)  # until the other end is closed


def connect(port: int, *, is_master: bool = False) -> Any:
    return dist.TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=30))


@functools.cache
def client(port: int, rank: int) -> Any:
    """The client of a rank, kept for the next test: where name servers are slow, a new one may take seconds."""
    return connect(port)
