"""Each request of a save, of the same step again, and of a load meets each fault that networks and servers have.

Once, or from then on, when the store is as good as dead. What is offered then is whole; what was promised is there.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import S3Storage
from shardckpt.storage.retrying import RetryPolicy
from tests.scorecard import Scale, Scorecard
from tests.storage import proxy
from tests.storage.proxy import Harm, Proxy, Request
from tests.storage.s3server import S3Server

pytestmark = [
    pytest.mark.s3,
    pytest.mark.crash,
    pytest.mark.timeout(3600),
    pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps"),
]

LIMIT = timedelta(seconds=60)
QUICKLY = RetryPolicy(tries=3, first_wait=timedelta(milliseconds=5), longest_wait=timedelta(milliseconds=20))
HARMS = (Harm.SLOW_DOWN, Harm.BROKEN, Harm.RESET, Harm.LOST, Harm.TRUNCATED, Harm.DENIED)
WAYS = [(harm, lasting) for harm in HARMS for lasting in (False, True)]
OLD, NEW = 1, 2


class Strike:
    """Takes the place of `Proxy.due`: harms the n-th request, and perhaps all after it."""

    def __init__(self, nth: int, harm: Harm, *, lasting: bool) -> None:
        self._lock, self._left, self._harm, self._lasting = threading.Lock(), nth, harm, lasting
        self.struck = False

    def __call__(self, request: Request) -> Harm | None:
        with self._lock:
            self._left -= 1
            if self._left > 0 or (self._left < 0 and not self._lasting):
                return None
            self.struck = True
            return self._harm


def state_of(seed: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((300,), float(seed))}, "seed": seed}


def save(checkpoints: sc.CheckpointManager, step: int) -> None:
    checkpoints.save(step, state_of(NEW)).result(LIMIT)


def load(checkpoints: sc.CheckpointManager) -> None:
    state = state_of(0)
    checkpoints.load(1, state)
    assert state["seed"] == OLD


VERBS: dict[str, tuple[Callable[[sc.CheckpointManager], None], dict[int, int], dict[int, int]]] = {
    "save": (lambda it: save(it, 2), {1: OLD}, {1: OLD, 2: NEW}),
    "save again": (lambda it: save(it, 1), {1: OLD}, {1: NEW}),
    "load": (load, {1: OLD}, {1: OLD}),
}
"""What is done, and what may be there before and after it: seeds by step."""


def manager(storage: S3Storage) -> sc.CheckpointManager:
    return sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)


def found(checkpoints: sc.CheckpointManager) -> dict[int, int]:
    seeds = {}
    for step in checkpoints.steps():
        state = checkpoints.load_checkpoint(step)
        seeds[step] = state["seed"]
        assert torch.equal(state["model"]["w"], state_of(state["seed"])["model"]["w"])
    return seeds


class Bench:
    """A store behind a proxy, and the way to it that meets no harm."""

    def __init__(self, server: S3Server, harmful: Proxy) -> None:
        self.server, self.harmful = server, harmful
        self.through = S3Server(harmful.endpoint, server.bucket, server.access_key, server.secret_key)

    def strike(self, name: str, nth: int, way: tuple[Harm, bool]) -> bool:
        """One row; False if there are not so many requests."""
        work, before, after = VERBS[name]
        url = f"s3://{self.server.bucket}/{uuid.uuid4().hex}"
        safe, exposed = self.server.storage(url), self.through.storage(url, retries=QUICKLY)
        with manager(safe) as checkpoints:
            checkpoints.save(1, state_of(OLD)).result(LIMIT)
        strike, error = Strike(nth, way[0], lasting=way[1]), None
        self.harmful.due = strike  # type: ignore[method-assign]
        try:
            with manager(exposed) as checkpoints:
                work(checkpoints)
        except sc.CheckpointError as caught:
            error = caught
        if not strike.struck:
            return False
        with manager(safe) as checkpoints:
            seeds = found(checkpoints)
            assert seeds in (before, after), (seeds, error)
            if error is None:
                assert seeds == after
            elif isinstance(error, sc.CheckpointSaveError) and not isinstance(error, sc.CommitUnknownError):
                assert seeds == before, f"told that it was not saved, but it is in force: {error}"
            work(checkpoints)
            assert found(checkpoints) == after
        assert safe.list_uploads() == []
        return True

    def sweep(self, name: str, *, full: bool) -> int:
        """Each request in each way, or every third one in one way; how many rows that were."""
        rows = 0
        for nth in itertools.count(1, 1 if full else 3):
            for way in WAYS if full else [WAYS[nth % len(WAYS)]]:
                if not self.strike(name, nth, way):
                    return rows
                rows += 1
        raise AssertionError("it has no end")


@pytest.fixture
def bench(s3: S3Server) -> Iterator[Bench]:
    with proxy.before(s3.endpoint) as harmful:
        yield Bench(s3, harmful)


@pytest.mark.parametrize("name", VERBS)
def test_every_request(bench: Bench, name: str, scale: Scale, scorecard: Scorecard) -> None:
    rows = bench.sweep(name, full=scale.factor is None)
    scorecard.add("every object-store request x fault", runs=rows, notes="moto")
    assert rows > 1


def test_that_an_error_was_swallowed_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = S3Storage.put

    def put(self: S3Storage, key: str, parts: Any) -> int:
        try:
            return real(self, key, parts)
        except OSError:
            return sum(memoryview(part).nbytes for part in parts)

    monkeypatch.setattr(S3Storage, "put", put)

    def deny_each_in_turn() -> None:
        for nth in range(1, 20):
            bench.strike("save", nth, (Harm.DENIED, False))

    with pytest.raises((AssertionError, sc.CheckpointError)):
        deny_each_in_turn()
