"""Every gang passes the suite of the seam."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.gang import LocalGang, ProcessGroupGang, StoreGang
from shardckpt.testing.gang_suite import GangContract, Play, TeamContract
from shardckpt.testing.gangs import RanksError, run_threads
from shardckpt.testing.pool import ProcessPool
from tests.gang.conftest import client

RANKS = 4


class TestLocalGang(GangContract):
    @pytest.fixture
    def play(self) -> Play:
        return lambda act, *args: [act(LocalGang(), *args)]


class TestStoreGangOnHashStore(TeamContract):
    @pytest.fixture
    def play(self) -> Play:
        store = dist.HashStore()
        return in_threads(lambda rank: store)


class TestStoreGangOnTcpStore(TeamContract):
    @pytest.fixture
    def play(self, port: int) -> Play:
        return in_threads(lambda rank: client(port, rank))


class TestProcessGroupGang(TeamContract):
    @pytest.fixture
    def play(self, port: int, ranks: ProcessPool) -> Play:
        nonce = uuid.uuid4().hex
        return lambda act, *args: ranks.run(RANKS, on_process_group_gang, port, nonce, act, args, backend=None)


def in_threads(store_of: Callable[[int], Any]) -> Play:
    nonce = uuid.uuid4().hex

    def play(act: Callable[..., Any], *args: Any) -> list[Any]:
        def on_rank(rank: int) -> Any:
            gang = StoreGang(lambda: store_of(rank), rank=rank, size=RANKS, nonce=nonce)
            try:
                return act(gang, *args)
            finally:
                gang.close()

        settled = run_threads(RANKS, on_rank)
        errors = {rank: outcome for rank, outcome in enumerate(settled) if isinstance(outcome, BaseException)}
        if errors:
            raise RanksError(errors)
        return settled

    return play


def on_process_group_gang(
    rank: int, size: int, folder: Path, port: int, nonce: str, act: Callable[..., Any], args: Any
) -> Any:
    gang = ProcessGroupGang(lambda: client(port, rank), rank=rank, size=size, nonce=nonce)
    try:
        return act(gang, *args)
    finally:
        gang.close()
