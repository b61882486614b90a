"""`python -m benchmarks.gangs`: what rank 0 of a gang of thousands handles, over a real TCPStore.

Rank 0 is a `StoreGang` as it is, and so are all others, but those are driven one after the other by a few processes,
where a job would have a processor for each. So what is measured is rank 0 alone: it comes when all others have given
what they give. Counted are its requests to the store, the values it reads and their bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.cells import table
from shardckpt.engine.committing.bundles import as_bundle, fold_bundles, open_bundles
from shardckpt.engine.committing.receipts import Merged, compose_manifest, disagreements
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.saving.write import Receipt
from shardckpt.format.layout import new_attempt
from shardckpt.format.manifest import FileEntry, LayoutEntry, Table, TensorEntry, encode_manifest
from shardckpt.gang import StoreGang
from shardckpt.gang.wire.messages import Arrival
from shardckpt.gang.wire.tree import FLAT
from shardckpt.gang.wire.vain import Deadline

_TIMEOUT = timedelta(minutes=5)
_NEVER_FLAT = 10**9
_OPERATIONS = ("enter", "gather", "broadcast", "receipts")


class Counting:
    """The store as rank 0 uses it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = self.values = self.nbytes = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.requests += 1
            answer = getattr(self._store, name)(*args)
            given = answer if isinstance(answer, list) else [answer] if isinstance(answer, bytes) else []
            self.values += len(given)
            self.nbytes += sum(map(len, given))
            return answer

        return call

    def taken(self) -> tuple[int, int, int]:
        """Since the last time."""
        counts = (self.requests, self.values, self.nbytes)
        self.requests = self.values = self.nbytes = 0
        return counts


def receipt(rank: int, plain: int) -> Receipt:
    """Of a rank of FSDP2 with a file of its own: shards, of which nothing is said here, and `plain` optimizer steps."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    file = FileEntry(f"rank_{rank}.pt", 10**9 + rank, rank, "rank", rank, (1000, 2000, 3), (4000, 5000, 6))
    keys = {f"optimizer.state.model.layers.{i}.self_attn.q_proj.weight.step": digest("step") for i in range(plain)}
    own = {f"rng.{name}": digest(f"{name}{rank}") for name in ("torch", "python", "numpy")}
    wrote = {file.name: (0, file.nbytes)}
    return Receipt(rank, 0, (file,), {file.name: keys | own}, {}, "table", {"write": 1.0 + rank % 7}, wrote)


def tables(ranks: int, tensors: int) -> Merged:
    entries = {
        f"model.layers.{i}.self_attn.q_proj.weight": TensorEntry("float32", (4096, 4096), 0) for i in range(tensors)
    }
    return Merged((), (LayoutEntry("rank"),), (Table(tuple(range(ranks)), entries, {}),))


def serve(connection: Any) -> None:
    store = _connect(0, is_master=True)
    connection.send(store.port)
    connection.recv()


def _connect(port: int, *, is_master: bool = False) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=is_master, wait_for_workers=False, timeout=_TIMEOUT
    )


class Member:
    """A rank other than 0; a meeting in two halves, so that one thread can be many ranks."""

    def __init__(self, store: Any, rank: int, ranks: int, flat: int) -> None:
        self._gang = StoreGang(lambda: store, rank=rank, size=ranks, nonce="gangs", flat=flat)
        self._rank = rank

    def come(self, scope: str) -> None:
        gang, deadline = self._gang, Deadline(_TIMEOUT)
        gang._given = None
        conversation, _, _ = gang._hear(gang.mailbox.key("call", gang._calls), deadline)
        gang._calls += 1
        gang._give(gang.mailbox.key(conversation, "here"), Arrival(scope, ()).to_json(), deadline)
        gang._conversation, gang._operation = conversation, 0

    def hear_verdict(self) -> None:
        self._gang._hear(self._gang.mailbox.key(self._gang._conversation, "verdict"), Deadline(_TIMEOUT))

    def gather(self, value: Any, fold: Any = None) -> None:
        self._gang.gather(value, timeout=_TIMEOUT, fold=fold)

    def broadcast(self) -> None:
        self._gang.broadcast(None, timeout=_TIMEOUT)

    def close(self) -> None:
        self._gang.close()


def be_members(connection: Any, port: int, mine: Sequence[int], ranks: int, flat: int, plain: int) -> None:
    """In a process of its own: these ranks, one after the other; the first of a group after the rest of it."""
    store = _connect(port)
    members = [Member(store, rank, ranks, flat) for rank in reversed(mine)]
    acts: dict[str, Callable[[Member], None]] = {
        "ready": lambda member: None,
        "enter": lambda member: member.come("scope"),
        "gather": lambda member: member.gather("x" * 100),
        "broadcast": lambda member: None,
        "receipts": lambda member: member.gather(as_bundle(receipt(member._rank, plain)), fold_bundles),
        "heard": lambda member: member.broadcast(),
        "verdict": lambda member: member.hear_verdict(),
        "close": lambda member: member.close(),
    }
    while (act := connection.recv()) is not None:
        for member in members:
            acts[act](member)
        connection.send(act)


class Crew:
    """The processes that are the other ranks."""

    def __init__(self, port: int, ranks: int, flat: int, plain: int, *, processes: int = 4) -> None:
        context = multiprocessing.get_context("spawn")
        width = _width(ranks, flat)
        groups = [range(first, min(first + width, ranks)) for first in range(0, ranks, width)]
        shares = [[rank for group in groups[at::processes] for rank in group if rank] for at in range(processes)]
        self._processes, self._ends = [], []
        for share in (share for share in shares if share):
            ours, theirs = context.Pipe()
            process = context.Process(target=be_members, args=(theirs, port, share, ranks, flat, plain), daemon=True)
            process.start()
            self._processes.append(process)
            self._ends.append(ours)
        self.do("ready")

    def do(self, act: str) -> None:
        self.begin(act)
        self.wait()

    def begin(self, act: str) -> None:
        for end in self._ends:
            end.send(act)

    def wait(self) -> None:
        for end in self._ends:
            end.recv()

    def close(self) -> None:
        self.do("close")
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()


def _width(ranks: int, flat: int) -> int:
    from shardckpt.gang.wire.tree import Tree

    return min(Tree.of(ranks, flat=flat).width, 64)


class Rank0:
    """What rank 0 does, and what it costs: seconds, requests, values, bytes, by operation."""

    def __init__(self, port: int, ranks: int, flat: int, plain: int) -> None:
        self.store: Any = Counting(_connect(port))
        self.gang = StoreGang(lambda: self.store, rank=0, size=ranks, nonce="gangs", flat=flat)
        self.ranks, self.plain = ranks, plain
        self.seen: dict[str, list[tuple[float, int, int, int]]] = {}

    def measure(self, name: str, act: Any) -> Any:
        self.store.taken()
        began = time.perf_counter()
        result = act()
        self.seen.setdefault(name, []).append((time.perf_counter() - began, *self.store.taken()))
        return result

    def round(self, crew: Crew) -> None:
        """A meeting, a plain gathering, a word to all, and the receipts up to the record."""
        crew.begin("enter")  # they wait for the call
        self.measure("enter", lambda: self.gang.enter("scope", timeout=_TIMEOUT))
        crew.wait()
        crew.do("verdict")
        for act, gather in (("gather", self._gather), ("receipts", self._receipts)):
            crew.do(act)
            self.measure(act, gather)
            self.measure("broadcast", lambda: self.gang.broadcast("well", timeout=_TIMEOUT))
            crew.do("heard")

    def _gather(self) -> None:
        assert len(self.gang.gather("x" * 100, timeout=_TIMEOUT) or ()) == self.ranks

    def _receipts(self) -> None:
        gathered = self.gang.gather(as_bundle(receipt(0, self.plain)), timeout=_TIMEOUT, fold=fold_bundles)
        assert gathered is not None
        with uncollected():
            bundle = open_bundles(gathered)
            assert len(bundle.receipts) == self.ranks
            assert not disagreements(bundle.receipts)
            merged = tables(self.ranks, self.plain)
            facts: Any = (1, new_attempt(), "2026-01-01T00:00:00.000+00:00", bundle.receipts, merged, {})
            record = encode_manifest(compose_manifest(*facts, differ=bundle.differ))
        assert len(bundle.differ) == 3
        assert len(record) > self.ranks


def run(ranks: int, *, flat: int, plain: int, rounds: int) -> list[list[str]]:
    """Rows for a table: one for each operation."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    crew = Crew(port, ranks, flat, plain)
    rank_0 = Rank0(port, ranks, flat, plain)
    try:
        for _ in range(rounds):
            rank_0.round(crew)
    finally:
        rank_0.gang.close()
        crew.close()
        ours.send(None)
        server.join()
    how = "flat" if ranks <= flat else "tree"
    rows = []
    for name in _OPERATIONS:
        seconds, requests, values, nbytes = zip(*rank_0.seen[name], strict=True)
        spread = f"{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
        counts = [f"{median(each):g}" for each in (requests, values)]
        rows.append([str(ranks), how, name, *counts, f"{median(nbytes) / 1e6:.2f}", spread])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gangs", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--tensors", type=int, default=1000, help="plain ones, and in the record, of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flat", action="store_true", help="without a tree, however many ranks there are")
    given = parser.parse_args(argv)
    flat = _NEVER_FLAT if given.flat else FLAT
    measure = partial(run, flat=flat, plain=given.tensors, rounds=given.rounds)
    heads = ["ranks", "", "operation", "requests", "values", "MB", "seconds (range)"]
    rows = [row for ranks in given.ranks for row in measure(ranks)]
    print(
        "\n".join(table("Rank 0, over a TCPStore (enter: with the others' part, four processes for all)", heads, rows))
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
