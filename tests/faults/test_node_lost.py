"""A node vanishes: the link between two of them is cut, without a word to anybody, in the middle of something.

Both ranks live on, each on its side. Both are to raise in time and to say who is missing, and what lies in the storage
that they share is whole, also for the job that is started when the link is there again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import shardckpt as sc
from shardckpt.format.layout import MANIFEST
from shardckpt.storage.base import Buffer, Read, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.pool import ProcessPool
from tests.faults.gangwork import Trap, blank_state, make_state, same
from tests.faults.nodes import Nodes
from tests.run.making import is_whole
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.root, pytest.mark.crash, pytest.mark.timeout(600)]

DEADLINE = timedelta(seconds=4)
MARGIN_S = (2.0, 3.0)
"""By rank. Rank 0 is the first to give up, and tells the others; they wait a second longer for what it says."""
CALL_S = 60.0
PORTS = count(29500)
"""Of the first node, on which nothing else is; but a process keeps the server that it has had at a port elsewhere."""
RANKS = 2

SAVE, LOAD, WAIT, CLOSE, RECEIPT, RECORD = "save", "load", "wait", "close", "receipt", "record"
GLOO, STORE = "gloo", "store"
CUTS = [(SAVE, GLOO), (CLOSE, STORE), (LOAD, STORE), (RECEIPT, GLOO)]
MORE_CUTS = [(phase, kind) for phase in (SAVE, LOAD, WAIT, CLOSE, RECEIPT, RECORD) for kind in (GLOO, STORE)]
MORE_CUTS = [cut for cut in MORE_CUTS if cut not in CUTS]


class Cutting(StorageWrapper):
    """The link is cut when the second rank has written half of its file of step 2, or all of it but has not said so, or
    when it reads its own file; or when the first rank is about to put the record."""

    def __init__(self, inner: Storage, phase: str, cut: Callable[[], None]) -> None:
        super().__init__(inner)
        self._phase, self._cut = phase, cut

    def put(self, key: str, parts: Any) -> int:
        if not key.startswith("step_2") or not key.endswith(MANIFEST if self._phase == RECORD else "rank_1.pt"):
            return super().put(key, parts)
        if self._phase == RECORD:
            self._strike()
        nbytes = super().put(key, self._halves(parts) if self._phase in (WAIT, CLOSE) else parts)
        if self._phase == RECEIPT:
            self._strike()
        return nbytes

    def read_into(self, reads: Sequence[Read]) -> None:
        if self._phase == LOAD and any(read.key.endswith("rank_1.pt") for read in reads):
            self._strike()
        super().read_into(reads)

    def _strike(self) -> None:
        self._phase = ""
        self._cut()

    def _halves(self, parts: Any) -> Iterator[Buffer]:
        for part in parts:
            view = memoryview(part)
            yield view[: len(view) // 2]
            if self._phase:
                self._strike()
            yield view[len(view) // 2 :]


@contextmanager
def job(rank: int, nodes: Nodes, kind: str, port: int) -> Iterator[sc.Gangs]:
    """This rank on its node, and the gangs of the two: over gloo, or over a store in the first rank's process."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": nodes.address(0), "MASTER_PORT": str(port)}
    with nodes.on(rank), mock.patch.dict(os.environ, {**place, "GLOO_SOCKET_IFNAME": nodes.link}):
        if kind == GLOO:
            dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        gangs = sc.Gangs.from_env()
        try:
            yield gangs
        finally:
            gangs.close()
            if kind == GLOO:
                dist.destroy_process_group()


def act(checkpoints: sc.CheckpointManager, phase: str, rank: int, cut: Callable[[], None]) -> None:
    """What the link is cut in the middle of."""
    if phase == LOAD:
        checkpoints.load(1, blank_state(rank))
        return
    state = make_state(rank, 2)
    if phase == SAVE:
        state["link"] = Trap(cut) if rank else Trap(lambda: None)
    pending = checkpoints.save(2, state, replicated=("model",))
    if phase == SAVE:
        pending.result()
    elif phase != CLOSE:
        checkpoints.wait()


def lose_the_other(
    rank: int, size: int, folder: Path, root: Path, nodes: Nodes, phase: str, kind: str, port: int
) -> dict[str, Any]:
    """What this rank saw, and how long after the cut."""
    moment = folder / "cut"

    def cut() -> None:
        moment.write_text(str(time.monotonic()))  # of the machine, not of the process
        nodes.cut()

    storage: Storage = LocalStorage(root)
    seen: dict[str, Any] = {"kind": None, "text": ""}
    with job(rank, nodes, kind, port) as gangs:
        try:
            cuts = rank == (0 if phase == RECORD else 1)
            with sc.CheckpointManager(Cutting(storage, phase, cut) if cuts else storage, gangs, timeout=DEADLINE) as it:
                it.save(1, make_state(rank, 1), replicated=("model",)).result()
                act(it, phase, rank, cut)
        except sc.CheckpointError as error:
            seen = {"kind": type(error), "text": str(error)}
    seen["ended_after_s"] = time.monotonic() - float(moment.read_text())
    return seen


def go_on(rank: int, size: int, folder: Path, root: Path, nodes: Nodes, kind: str, port: int) -> dict[str, Any]:
    """The job that is started when the link is there again."""
    with job(rank, nodes, kind, port) as gangs, sc.CheckpointManager(root, gangs) as checkpoints:
        steps, state = checkpoints.steps(), blank_state(rank)
        info = checkpoints.resume(state)
        resumed = info is not None and info.step == steps[-1] and same(state, make_state(rank, info.step))
        checkpoints.save(3, make_state(rank, 3), replicated=("model",)).result()
        return {"steps": steps, "resumed": resumed, "after": checkpoints.steps()}


@pytest.mark.parametrize(("phase", "kind"), [*CUTS, *MORE_CUTS])
def test_a_node_vanishes(
    ranks: ProcessPool, tmp_path: Path, nodes: Nodes, scale: Scale, scorecard: Scorecard, phase: str, kind: str
) -> None:
    if (phase, kind) in MORE_CUTS and scale.runs(sample=1, full=2) < 2:
        pytest.skip("in a larger run: --scale 2")
    outcomes = ranks.run_settled(
        RANKS, lose_the_other, tmp_path, nodes, phase, kind, next(PORTS), backend=None, timeout=CALL_S
    )
    steps = sc.CheckpointManager(tmp_path, sc.Gangs.local()).steps()
    torn = sum(not is_whole(LocalStorage(tmp_path), step) for step in steps)
    scorecard.add(
        "a node that vanishes", runs=1, torn=torn, lost=1 not in steps, hangs=any(it.error for it in outcomes),
        notes="link between two network namespaces cut",
    )  # fmt: skip
    # Whoever puts the record has all receipts: the step is there, and only the other does not know.
    there, failing = ([1, 2], [1]) if phase == RECORD else ([1], [0, 1])
    assert (steps, torn) == (there, 0)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, str(outcome)
        seen = outcome.value
        assert seen["ended_after_s"] < DEADLINE.total_seconds() + MARGIN_S[rank], (rank, seen)
        assert (seen["kind"] is not None) == (rank in failing), (rank, seen)
        if rank not in failing:
            continue
        assert f"rank {1 - rank}" in seen["text"], (rank, seen)
        assert phase != RECORD or seen["kind"] is sc.CommitUnknownError, seen
    nodes.mend()
    for found in ranks.run(RANKS, go_on, tmp_path, nodes, kind, next(PORTS), backend=None, timeout=CALL_S):
        assert found == {"steps": there, "resumed": True, "after": [*there, 3]}


@pytest.mark.parametrize("nodes", ["ipv6"], indirect=True)
def test_nodes_that_speak_nothing_but_ipv6(ranks: ProcessPool, tmp_path: Path, nodes: Nodes) -> None:
    for kind, steps in ((GLOO, []), (STORE, [3])):
        for found in ranks.run(RANKS, go_on, tmp_path, nodes, kind, next(PORTS), backend=None, timeout=CALL_S):
            assert found == {"steps": steps, "resumed": bool(steps), "after": [3]}
        nodes.cut()
        nodes.mend()
