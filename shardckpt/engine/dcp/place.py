"""Which checkpoint a URL names: a root and a folder in it. And the record that lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, is_attempt, parse_step
from shardckpt.format.manifest import Manifest, decode_manifest
from shardckpt.storage import RenamingStorage, Storage, check_key, open_storage, redact


@dataclass(frozen=True, slots=True)
class Place:
    """One checkpoint, there or not: the `folder` below `root`. Travels to other processes as long as `root` does."""

    root: str | Storage = field(repr=False)
    folder: str
    storage_options: Mapping[str, object] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int | None:
        """The step that the folder's name says; None for any other name."""
        return parse_step(self.folder)

    @property
    def url(self) -> str:
        """For people and logs: without credentials."""
        root = redact(self.root) if isinstance(self.root, str) else self.root.url
        return f"{root.rstrip('/')}/{self.folder}"

    def open(self) -> Storage:
        """The storage at the root; a new one, unless one was given."""
        if isinstance(self.root, str):
            return open_storage(self.root, storage_options=dict(self.storage_options))
        return self.root

    def moved_to(self, checkpoint_id: str | os.PathLike[str]) -> Place:
        """The place of another checkpoint: of that URL, or of that folder in the storage that was given."""
        storage = None if isinstance(self.root, str) else self.root
        return place_of(checkpoint_id, storage=storage, storage_options=self.storage_options)


def place_of(
    url: str | os.PathLike[str],
    *,
    storage: Storage | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Place:
    """The place that a path or URL names or, with a `storage`, a folder's name in it. `ValueError` if it names none."""
    root, folder = ("", os.fspath(url).rstrip("/")) if storage is not None else _split(url)
    try:
        check_key(folder)
    except ValueError:
        folder = ""
    if not folder or "/" in folder:
        what = "the name of one folder in the storage" if storage is not None else "a root and a folder in it"
        raise ValueError(f"{redact(os.fspath(url))!r} does not name a checkpoint: give {what}, like runs/a/step_100")
    return Place(root if storage is None else storage, folder, dict(storage_options or {}))


def find_record(storage: Storage, folder: str) -> tuple[str, Manifest]:
    """Where the checkpoint called `folder` lies, and its record.

    On a file system it may lie under its `.old` name, for a moment or for good, if it was being replaced; to look here,
    there and here again finds it in any case (the proof is in `shardckpt.run.catalog`). Called on every rank.
    `CheckpointNotFoundError` if there is none, `CheckpointDamagedError` for what is not a whole record of it,
    `CheckpointLoadError` if it cannot be read now.
    """
    step = parse_step(folder)
    where = f"{storage.url.rstrip('/')}/{folder}"
    try:
        found = _look(storage, folder) or _look_aside(storage, folder) or _look(storage, folder)
    except OSError as error:
        raise CheckpointLoadError(f"{where}: the record cannot be read now: {error}", step=step) from error
    except ValueError as error:
        raise CheckpointDamagedError(
            f"{where}: its record is damaged: {error}. Load another checkpoint, or bring the file back from a copy",
            step=step,
        ) from error
    if found is None:
        raise CheckpointNotFoundError(f"{where}: there is no committed checkpoint", step=step)
    if step is not None and found[1].step != step:
        raise CheckpointDamagedError(
            f"{where}: this is the record of step {found[1].step}: the folder was renamed or copied", step=step
        )
    return found


def _split(url: str | os.PathLike[str]) -> tuple[str, str]:
    text = os.fspath(url)
    scheme, mark, path = text.partition("://")
    if not text:
        return "", ""
    if not isinstance(url, str) or not mark:
        return os.path.split(os.path.abspath(os.path.expanduser(text)))
    root, slash, folder = path.rstrip("/").rpartition("/")
    if not slash or re.search(r"[?#]", folder):
        return "", ""
    return f"{scheme}://{root or '/'}", folder


def _look(storage: Storage, folder: str) -> tuple[str, Manifest] | None:
    try:
        return folder, decode_manifest(storage.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return None


def _look_aside(storage: Storage, folder: str) -> tuple[str, Manifest] | None:
    """The one that was set aside last, of those that were."""
    if not isinstance(storage, RenamingStorage):
        return None
    names = [name for name in storage.list() if name.startswith(f"{folder}.") and name.endswith(".old/")]
    asides = [name[:-1] for name in names if is_attempt(name[len(folder) + 1 : -len(".old/")])]
    found = [there for aside in asides if (there := _look(storage, aside)) is not None]
    return max(found, key=lambda there: there[1].created, default=None)
