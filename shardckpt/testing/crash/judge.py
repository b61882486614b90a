"""Whether what is found after a crash is what had been promised: only whole checkpoints, and none lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.crash.operations import Allowed

NOTHING: frozenset[object] = frozenset({None})


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise."""

    kind: Literal["torn", "lost", "back", "outside"]
    """Offered and not whole; acknowledged and no longer there (or an older one in its place); deleted and there again;
    something of others that was changed."""
    step: int
    detail: str


class Reader(Protocol):
    """How checkpoints are found and read: of this package, or of another that is compared with it."""

    def steps(self, storage: Storage) -> list[int]:
        """The steps that are offered to whoever wants to go on."""
        ...

    def version(self, storage: Storage, step: int) -> object:
        """Which of the versions that were saved it is, all of it read. Raises if it is none of them, or unreadable."""
        ...


def judge(
    storage: Storage, allowed: Allowed, reader: Reader, *, told: tuple[type[Exception], ...] = ()
) -> list[Finding]:
    """What is wrong with what is found. `told`: errors that say that a step is damaged, where it may be."""
    findings: list[Finding] = []
    offered = reader.steps(storage)
    for step in offered:
        try:
            version = reader.version(storage, step)
        except told:
            continue
        except Exception as error:
            findings.append(Finding("torn", step, f"{type(error).__name__}: {error}"))
            continue
        may_be = allowed.get(step, NOTHING)
        if version not in may_be:
            kind: Literal["back", "lost"] = "back" if may_be == NOTHING else "lost"
            findings.append(Finding(kind, step, f"{version!r} is found, and not one of {sorted(map(repr, may_be))}"))
    if not told:
        for step, may_be in allowed.items():
            if None not in may_be and step not in offered:
                findings.append(Finding("lost", step, f"it is not offered, only {offered}"))
    return findings


def in_memory(files: Mapping[str, bytes], folders: frozenset[str], *, below: str = "") -> MemoryStorage:
    """The state as a storage; only what lies below that folder."""
    storage = MemoryStorage("crash state")
    prefix = f"{below}/" if below else ""
    for folder in sorted(folders):
        if folder.startswith(prefix) and folder != below:
            storage.make_folder(folder.removeprefix(prefix), exist_ok=True)
    for path, content in files.items():
        if path.startswith(prefix):
            storage.put(path.removeprefix(prefix), [content])
    return storage


def on_disk(files: Mapping[str, bytes], folders: frozenset[str], *, root: Path) -> None:
    """The state as files below an empty folder."""
    for folder in sorted(folders):
        os.makedirs(root / folder, exist_ok=True)
    for path, content in files.items():
        (root / path).write_bytes(content)


def walk(storage: Storage, prefix: str = "") -> Mapping[str, bytes]:
    """All files below a folder of a storage, by key."""
    found: dict[str, bytes] = {}
    for name in storage.list(prefix):
        key = f"{prefix}/{name}" if prefix else name
        if name.endswith("/"):
            found |= walk(storage, key[:-1])
        else:
            found[key] = storage.read(key)
    return found


class Remembering:
    """A reader that reads a step once for each content that its folder has: most states hold the same ones.

    Sound for readers that look, for a step, at nothing but the folder that `folder_of` gives and the one `beside`.
    """

    def __init__(self, reader: Reader, folder_of: Callable[[Storage, int], str], *, beside: str = "") -> None:
        self._reader = reader
        self._folder_of = folder_of
        self._beside = beside
        self._known: dict[object, object] = {}

    def steps(self, storage: Storage) -> list[int]:
        return self._reader.steps(storage)

    def version(self, storage: Storage, step: int) -> object:
        folder = self._folder_of(storage, step)
        below = walk(storage, folder)
        beside = walk(storage, self._beside) if self._beside else {}
        own = ((path.removeprefix(folder), content) for path, content in below.items())
        key = (step, frozenset(own), frozenset(beside.items()))
        if key not in self._known:
            try:
                self._known[key] = self._reader.version(storage, step)
            except Exception as error:
                self._known[key] = _Unreadable(error)
        known = self._known[key]
        if isinstance(known, _Unreadable):
            raise known.error.with_traceback(None)
        return known


@dataclass(frozen=True, slots=True)
class _Unreadable:
    error: Exception
