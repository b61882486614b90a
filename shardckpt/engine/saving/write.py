"""Write: put finished images into storage, and say what was put. The receipt is all that the commit believes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.engine.saving.progress import Progress
from shardckpt.engine.saving.stage import SealedFile
from shardckpt.format.manifest import FileEntry, decode_file, encode_file
from shardckpt.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one rank has durably written, and what it holds; travels to rank 0 as JSON."""

    rank: int
    shard: int
    files: tuple[FileEntry, ...]
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By file: key to a digest of its content, of keys that other files of the kind may hold too."""
    alike: Mapping[str, str] = field(default_factory=dict)
    """By file: one digest over what this rank holds of the tensors that it took to be the same on all its peers."""
    table: str = ""
    """Digest of this rank's table; the table itself is sent only if rank 0 asks for it."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "shard": self.shard,
            "files": [encode_file(file) for file in self.files],
            "digests": {file: dict(keys) for file, keys in self.digests.items()},
            "alike": dict(self.alike),
            "table": self.table,
            "seconds": dict(self.seconds),
        }


def decode_receipt(content: Mapping[str, Any]) -> Receipt:
    files = tuple(decode_file(entry) for entry in content["files"])
    return Receipt(**{**content, "files": files})


def write_files(
    storage: Storage, prefix: str, sealed: Sequence[SealedFile], progress: Progress
) -> tuple[FileEntry, ...]:
    """Put this rank's files below `prefix`, each durable when it returns. Called on the save thread of every rank."""
    for file in sealed:
        progress.check()
        storage.put(f"{prefix}/{file.entry.name}", file.parts)
        progress.add(file.entry.nbytes)
    return tuple(file.entry for file in sealed)
