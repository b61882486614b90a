"""`python -m benchmarks.steps`: how many requests a run of very many steps costs, counted.

In memory, as a file system and as an object store, requests are calls of the storage; on S3 (SeaweedFS, which is
started and ended) they are those that go out over HTTP.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from benchmarks.cells import table
from shardckpt.format.layout import MANIFEST, step_folder
from shardckpt.format.manifest import FileEntry, LayoutEntry, Manifest, Table, encode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.run.prune import retain
from shardckpt.run.requests import each
from shardckpt.run.retention import KeepAll, KeepLast
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.tools.listing import list_checkpoints

_SHOWN = 20
Question = tuple[str, Callable[[Storage], object]]


def questions(steps: int) -> list[Question]:
    """In this order: the last ones delete a step."""
    return [
        ("newest step (`latest`)", lambda storage: Catalog(storage).latest()),
        ("newest step and its record (`resume`)", lambda storage: next(Catalog(storage).full_steps())),
        ("is this step there", lambda storage: Catalog(storage).has(steps // 2)),
        ("all steps (`steps()`)", lambda storage: Catalog(storage).steps()),
        (f"`ls --last {_SHOWN}`", lambda storage: list_checkpoints(storage, last=_SHOWN)),
        ("`ls`", lambda storage: list_checkpoints(storage)),
        ("after a save, keep all", lambda storage: retain(Catalog(storage), KeepAll())),
        ("dead attempts, first look", _looks(1)),
        ("dead attempts, first look and sixteen more", _looks(17)),
        ("after a save, keep all but one", lambda storage: retain(Catalog(storage), KeepLast(steps - 1))),
    ]


def _looks(count: int) -> Callable[[Storage], object]:
    """So many looks for dead attempts, of which there are four in an hour by default."""

    def look(storage: Storage) -> None:
        now = [0.0]
        dead = DeadAttempts(Catalog(storage), grace=timedelta(seconds=4), clock=lambda: now[0])
        for _ in range(count):
            dead.tidy()
            now[0] += 1

    return look


def fill(storage: Storage, steps: int) -> None:
    """Steps of one small file each, as the engine leaves them, but not durable, and many at once."""
    layouts, table_ = (LayoutEntry("rank"),), Table((0,), {}, {"step": "rank"})
    renames = isinstance(storage, RenamingStorage)

    def put(step: int) -> None:
        folder, attempt = step_folder(step), f"{step:020d}"
        name = "rank_0.pt" if renames else f"{attempt}/rank_0.pt"
        file = FileEntry(name, 9, 1, "rank", 0)
        facts = (step, attempt, "2026-11-27T00:00:00.000+00:00", (0,), (file,))
        record = encode_manifest(Manifest(*facts, layouts=layouts, tables=(table_,)))
        storage.replace(f"{folder}/{name}", b"nine byte")
        storage.replace(f"{folder}/{MANIFEST}", record)

    if renames:
        for step in range(steps):
            storage.make_folder(step_folder(step), exist_ok=True)  # type: ignore[attr-defined]
    each(put, range(steps))


class Calls(StorageWrapper):
    """Counts the calls of a storage."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.count = 0

    def around(self, operation: Operation, call: Callable[[], Any]) -> Any:
        self.count += 1
        return call()


class Sent:
    """Counts what s3fs sends, of all storages of this process."""

    def __init__(self) -> None:
        session_type: Any = importlib.import_module("aiobotocore.httpsession").AIOHTTPSession
        self.count, send = 0, session_type.send

        async def counted(session: Any, request: Any) -> Any:
            self.count += 1
            return await send(session, request)

        session_type.send = counted


@contextmanager
def places(names: Sequence[str]) -> Iterator[list[tuple[str, Storage, Callable[[Storage], tuple[Storage, Any]]]]]:
    """Name and storage of each, and how requests to it are counted."""

    def calls(storage: Storage) -> tuple[Storage, Any]:
        counter: Any = Calls(storage)
        return counter, counter

    with ExitStack() as stack:
        found: list[tuple[str, Storage, Callable[[Storage], tuple[Storage, Any]]]] = []
        if "memory" in names:
            found += [("memory, as files", MemoryStorage(), calls), ("memory, as objects", MemoryObjects(), calls)]
        if "disk" in names:
            found.append(("disk", LocalStorage(stack.enter_context(tempfile.TemporaryDirectory())), calls))
        if "s3" in names:
            from shardckpt.testing.servers import seaweed

            server = stack.enter_context(seaweed.running())
            sent = Sent()
            storage = open_storage(f"s3://{server.bucket}/steps", storage_options=server.options)
            stack.callback(storage.close)
            found.append(("S3 (SeaweedFS)", storage, lambda storage: (storage, sent)))
        yield found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--places", nargs="+", choices=("memory", "disk", "s3"), default=["memory", "disk"])
    given = parser.parse_args(argv)
    logging.disable()
    rows: dict[str, list[str]] = {}
    with places(given.places) as found:
        for _, storage, counter_of in found:
            fill(storage, given.steps)
            for name, question in questions(given.steps):
                seen, counter = counter_of(storage)
                before, began = counter.count, time.perf_counter()
                question(seen)
                rows.setdefault(name, []).append(f"{counter.count - before} ({time.perf_counter() - began:.2f} s)")
    lines = [[name, *cells] for name, cells in rows.items()]
    print("\n".join(table(f"Requests, of a run of {given.steps} steps", ["", *(name for name, _, _ in found)], lines)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
