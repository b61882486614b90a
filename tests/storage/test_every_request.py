"""Each request of a save, of the same step again, of a load and of a prune meets each fault that networks and servers
have.

Once, or from then on, when the store is as good as dead. What is offered then is whole; what was promised is there.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count, takewhile
from typing import Any, TypeAlias

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.storage import S3Storage, Transfers
from shardckpt.storage.objects import requests
from shardckpt.storage.retrying import RetryPolicy
from tests.scorecard import Scale, Scorecard
from tests.storage import proxy
from tests.storage.proxy import Harm, Proxy, Request
from tests.storage.s3server import S3Server

pytestmark = [
    pytest.mark.s3,
    pytest.mark.crash,
    pytest.mark.timeout(7200),
    pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps"),
]

LIMIT = timedelta(seconds=60)
QUICKLY = RetryPolicy(tries=3, first_wait=timedelta(milliseconds=5), longest_wait=timedelta(milliseconds=20))
PATIENCE_S = 0.4
"""How long the client waits for an answer; of a dead store, each request three times."""
HARMS = (
    Harm.SLOW_DOWN, Harm.BROKEN, Harm.RESET, Harm.LOST, Harm.TRUNCATED, Harm.DENIED,
    Harm.TWICE, Harm.ERROR_INSIDE, Harm.GARBAGE, Harm.STALL, Harm.STUCK,
)  # fmt: skip
WAYS = [(harm, bool((place + turn) % 2)) for turn in range(2) for place, harm in enumerate(HARMS)]
"""Each harm once, every other one to last; then the other way round."""
OF_LISTINGS = [(Harm.CUT_LISTING, lasting) for lasting in (False, True)]
ADVICE = ("again", "check ", "Check ", "load another step")
"""One of these is in each error: what to do."""
OLD, NEW = 1, 2


Way: TypeAlias = tuple[Harm, bool]
"""And whether it is done from then on to all requests."""


class Strike:
    """Takes the place of `Proxy.due`: harms the n-th request that it can harm, and perhaps all after it."""

    def __init__(self, nth: int, harm: Harm, *, lasting: bool) -> None:
        self._lock, self._left, self._harm, self._lasting = threading.Lock(), nth, harm, lasting
        self.struck: Request | None = None

    def __call__(self, request: Request) -> Harm | None:
        with self._lock:
            if self._harm is Harm.CUT_LISTING and request.kind != "list":
                return None
            self._left -= 1
            if self._left > 0 or (self._left < 0 and not self._lasting):
                return None
            self.struck = self.struck or request
            return self._harm


def state_of(seed: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((300,), float(seed))}, "seed": seed}


def save(checkpoints: sc.CheckpointManager, step: int) -> None:
    checkpoints.save(step, state_of(NEW)).result(LIMIT)


def load(checkpoints: sc.CheckpointManager) -> None:
    state = state_of(0)
    checkpoints.load(1, state)
    assert state["seed"] == OLD


def resume(checkpoints: sc.CheckpointManager) -> None:
    state = state_of(0)
    found = checkpoints.resume(state)
    assert (found and found.step, state["seed"]) == (2, OLD), "it goes on from another step, or from none"


@dataclass(frozen=True)
class Verb:
    """What is done, and what may be there before and after it: seeds by step."""

    do: Callable[[sc.CheckpointManager], None]
    before: dict[int, int]
    after: dict[int, int]
    first: int
    """The way of `WAYS` with which a sample begins, so that all verbs together meet each harm."""
    transfers: Transfers | None = None


VERBS = {
    "save": Verb(lambda it: save(it, 2), {1: OLD}, {1: OLD, 2: NEW}, 0),
    "save again": Verb(lambda it: save(it, 1), {1: OLD}, {1: NEW}, 3),
    "save in parts": Verb(lambda it: save(it, 2), {1: OLD}, {1: OLD, 2: NEW}, 6, Transfers(whole_nbytes=1000)),
    "load": Verb(load, {1: OLD}, {1: OLD}, 9),
    "resume": Verb(resume, {1: OLD, 2: OLD}, {1: OLD, 2: OLD}, 11),
    "prune": Verb(lambda it: it.keep_last_n_checkpoints(1), {1: OLD, 2: OLD}, {2: OLD}, 13),
}


def manager(storage: S3Storage) -> sc.CheckpointManager:
    return sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT)


def found(checkpoints: sc.CheckpointManager) -> dict[int, int]:
    """Seeds by step. -1 of one that is offered and is not whole."""
    seeds = {}
    for step in checkpoints.steps():
        try:
            state = checkpoints.load_checkpoint(step)
            whole = torch.equal(state["model"]["w"], state_of(state["seed"])["model"]["w"])
        except sc.CheckpointError:
            whole = False
        seeds[step] = state["seed"] if whole else -1
    return seeds


@dataclass(frozen=True)
class Outcome:
    """Of one row."""

    torn: bool = False
    lost: bool = False
    hung: bool = False
    problem: str = ""


def judge(verb: Verb, seeds: dict[int, int], error: sc.CheckpointError | None) -> Outcome:
    """What is there when it has ended in this way."""
    told = f"there is {seeds}, and it was told: {error!r}"
    if -1 in seeds.values():
        return Outcome(torn=True, problem=f"torn: {told}")
    if seeds not in (verb.before, verb.after):
        return Outcome(lost=True, problem=f"lost: {told}")
    if error is None:
        return Outcome() if seeds == verb.after else Outcome(lost=True, problem=f"acknowledged, but {told}")
    unknown = not isinstance(error, sc.CheckpointSaveError) or isinstance(error, sc.CommitUnknownError)
    if seeds != verb.before and not unknown:
        return Outcome(problem=f"told that it was not saved, but it is in force: {told}")
    if not any(word in str(error) for word in ADVICE):
        return Outcome(problem=f"does not say what to do: {told}")
    return Outcome()


class Bench:
    """A store behind a proxy, and the way to it that meets no harm."""

    def __init__(self, server: S3Server, harmful: Proxy) -> None:
        self.server, self.harmful = server, harmful
        self.through = S3Server(
            harmful.endpoint, server.bucket, server.access_key, server.secret_key, patience_s=PATIENCE_S
        )

    def strike(self, name: str, nth: int, way: Way) -> Outcome | None:
        """One row; None if there are not so many requests."""
        verb, (harm, lasting) = VERBS[name], way
        url = f"s3://{self.server.bucket}/{uuid.uuid4().hex}"
        safe = self.server.storage(url)
        exposed = self.through.storage(url, retries=QUICKLY, transfers=verb.transfers)
        with manager(safe) as checkpoints:
            for step, seed in verb.before.items():
                checkpoints.save(step, state_of(seed)).result(LIMIT)
        strike, error, began = Strike(nth, harm, lasting=lasting), None, time.monotonic()
        self.harmful.due = strike  # type: ignore[method-assign]
        try:
            with manager(exposed) as checkpoints:
                verb.do(checkpoints)
        except (sc.CheckpointError, AssertionError) as caught:
            error = caught
        if strike.struck is None:
            return None
        took_s = time.monotonic() - began
        if took_s > LIMIT.total_seconds():
            outcome = Outcome(hung=True, problem=f"it took {took_s:.0f} s")
        elif isinstance(error, AssertionError):
            outcome = Outcome(lost=True, problem=f"it came to an end, but {error}")
        else:
            outcome = self.look(verb, safe, error)
        if not outcome.problem:
            return outcome
        row = f"{name}, request {nth} ({strike.struck.method} {strike.struck.path}), {harm.name}, lasting: {lasting}"
        return replace(outcome, problem=f"{row}: {outcome.problem}")

    def look(self, verb: Verb, safe: S3Storage, error: sc.CheckpointError | None) -> Outcome:
        """What is there, and whether the next job can go on from it and leaves nothing."""
        with manager(safe) as checkpoints:
            outcome = judge(verb, found(checkpoints), error)
            if outcome.problem:
                return outcome
            verb.do(checkpoints)
            leftovers = DeadAttempts(Catalog(safe), grace=timedelta(0))
            for _ in range(2):  # as it looks again an hour later
                leftovers.tidy()
            seeds, uploads = found(checkpoints), safe.list_uploads()
        if seeds != verb.after or uploads:
            return Outcome(problem=f"the next job left {seeds} and uploads {uploads}")
        return Outcome()

    def sweep(self, name: str, ways: Sequence[Way]) -> list[Outcome]:
        """Each request in each of these ways."""
        return [row for way in ways for row in self._until_none(self.strike(name, nth, way) for nth in count(1))]

    def sample(self, name: str) -> list[Outcome]:
        """Every eighth request, each in another way."""
        first = VERBS[name].first
        return self._until_none(self.strike(name, 1 + 8 * i, WAYS[(first + i) % len(WAYS)]) for i in count())

    @staticmethod
    def _until_none(rows: Iterator[Outcome | None]) -> list[Outcome]:
        return list(filter(None, takewhile(lambda row: row is not None, rows)))


@pytest.fixture
def bench(s3: S3Server) -> Iterator[Bench]:
    with proxy.before(s3.endpoint) as harmful:
        yield Bench(s3, harmful)


def tell(rows: list[Outcome], scorecard: Scorecard) -> None:
    torn, lost, hangs = (sum(getattr(row, name) for row in rows) for name in ("torn", "lost", "hung"))
    numbers = {"runs": len(rows), "torn": torn, "lost": lost, "hangs": hangs}
    scorecard.add("every object-store request x fault", **numbers, notes="moto")
    problems = [row.problem for row in rows if row.problem]
    assert not problems, f"{len(problems)} of {len(rows)} rows:\n" + "\n".join(problems)
    assert len(rows) > 1


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.sampled(2)
def test_every_request(bench: Bench, name: str, scale: Scale, scorecard: Scorecard) -> None:
    tell(bench.sweep(name, WAYS) if scale.factor is None else bench.sample(name), scorecard)


def test_every_listing(bench: Bench, scale: Scale, scorecard: Scorecard) -> None:
    """A step that is not listed is a step that is not resumed from, or one that is not kept."""
    full = scale.factor is None
    names, ways = (("resume", "prune"), OF_LISTINGS) if full else (("resume",), OF_LISTINGS[:1])
    tell([row for name in names for row in bench.sweep(name, ways)], scorecard)


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [("save", "put", "step_2/manifest"), ("load", "get", ".pt"), ("prune", "delete_objects", "")],
)
def test_a_store_that_does_not_answer_is_waited_for_until_the_deadline(
    bench: Bench, name: str, kind: str, key: str, scorecard: Scorecard
) -> None:
    """By a client that has the patience it has by itself: a minute for each try."""
    verb, url = VERBS[name], f"s3://{bench.server.bucket}/{uuid.uuid4().hex}"
    safe = bench.server.storage(url)
    patient = replace(bench.through, patience_s=None).storage(url, retries=QUICKLY)
    with manager(safe) as checkpoints:
        for step, seed in verb.before.items():
            checkpoints.save(step, state_of(seed)).result(LIMIT)
    bench.harmful.harm(Harm.STALL, kind, key=key, times=1000)
    began = time.monotonic()
    with (
        pytest.raises(sc.CheckpointError, match="does not answer"),
        sc.CheckpointManager(patient, sc.Gangs.local(), timeout=timedelta(seconds=1)) as checkpoints,
    ):
        verb.do(checkpoints)
    hung = time.monotonic() - began > 0.5 * LIMIT.total_seconds()
    scorecard.add("every object-store request x fault", runs=1, hangs=hung, notes="moto")
    assert not hung
    with manager(safe) as checkpoints:
        assert found(checkpoints) == verb.before


def test_that_an_error_was_swallowed_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = S3Storage.put

    def put(self: S3Storage, key: str, parts: Any) -> int:
        try:
            return real(self, key, parts)
        except OSError:
            return sum(memoryview(part).nbytes for part in parts)

    monkeypatch.setattr(S3Storage, "put", put)
    rows = (bench.strike("save", nth, (Harm.DENIED, False)) for nth in range(8, 13))
    assert any(row is not None and (row.torn or row.lost) for row in rows)


def test_that_a_page_was_taken_for_an_answer_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As botocore takes it: a deletion that was not done, and a step of which only the record is left."""
    monkeypatch.setattr(requests, "_answered", lambda answer, name: answer.get(name))
    rows = (bench.strike("prune", nth, (Harm.GARBAGE, False)) for nth in range(6, 12))
    assert any(row is not None and row.torn for row in rows)
