"""What listing, finding and pruning cost a run of many steps: the real catalog, over a storage that counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.scale.saving import timed
from shardckpt.format.layout import MANIFEST, step_folder
from shardckpt.format.manifest import FileEntry, LayoutEntry, Manifest, Table, encode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.run.prune import plan_retention
from shardckpt.run.retention import KeepLast
from shardckpt.storage.base import Read
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.wrapping import StorageWrapper


class Counted(StorageWrapper):
    """Counts what a server would be asked."""

    def __init__(self, inner: MemoryObjects) -> None:
        super().__init__(inner)
        self.requests: Counter[str] = Counter()

    def list(self, prefix: str = "") -> list[str]:
        names = super().list(prefix)
        self.requests["list"] += max(1, -(-len(names) // 1000))  # a page has a thousand names
        return names

    def size(self, key: str) -> int:
        self.requests["look"] += 1
        return super().size(key)

    def read(self, key: str) -> bytes:
        self.requests["get"] += 1
        return super().read(key)

    def read_into(self, reads: Sequence[Read]) -> None:
        self.requests["get"] += len(reads)
        super().read_into(reads)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = list(keys)
        self.requests["delete"] += max(1, -(-len(doomed) // 1000))
        super().delete(doomed)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one question to a run took."""

    seconds: float
    """Of the processor, of this thread; the requests themselves go to memory."""
    requests: dict[str, int]


def ask(steps: int) -> dict[str, Asked]:
    """Of a run of so many small steps on an object store."""
    objects = MemoryObjects()
    table = Table((0,), {}, {"step": "rank"})
    layouts = (LayoutEntry("rank"),)
    one = Manifest(0, "0" * 20, "2026-11-27T00:00:00.000+00:00", (0,), (), layouts=layouts, tables=(table,))
    for step in range(steps):
        attempt = f"{step:020d}"
        file = FileEntry(f"{attempt}/rank_0.pt", 9, 1, "rank", 0)
        folder = step_folder(step)
        objects.put(f"{folder}/{file.name}", [b"nine byte"])
        record = replace(one, step=step, attempt=attempt, files=(file,))
        objects.put(f"{folder}/{MANIFEST}", [encode_manifest(record)])
    found = {}
    for what, work in (
        ("newest step", lambda catalog: catalog.latest()),
        ("all steps", lambda catalog: catalog.steps()),
        ("what to prune (keep 3)", lambda catalog: plan_retention(catalog, KeepLast(3))),
    ):
        storage: Any = Counted(objects)
        catalog = Catalog(storage)
        _, seconds = timed(lambda work=work, catalog=catalog: work(catalog))  # type: ignore[misc]
        found[what] = Asked(seconds, dict(storage.requests))
    return found
