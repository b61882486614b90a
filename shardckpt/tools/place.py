"""From what a person gave, a URL or a path, to the checkpoints that are meant. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from shardckpt.errors import CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, parse_aside, parse_step
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage, options_for

Where: TypeAlias = str | os.PathLike[str] | Storage

ARCHIVES = (".pt", ".pth", ".bin", ".ckpt", ".zip", ".safetensors", ".npz", ".distcp")
"""How the names of files end that may hold a checkpoint of others."""


@dataclass(frozen=True, slots=True)
class Place:
    """A storage, and which of the folders in it is meant, if it is one; or which file."""

    storage: Storage
    folder: str = ""
    file: str = ""


@contextmanager
def opened(where: Where, options: Mapping[str, object] | None = None) -> Iterator[Place]:
    """What is meant by a path or URL: a run, one step of it (`.../step_100`), one file, or any folder.

    `CheckpointNotFoundError` where there is nothing, `CheckpointLoadError` where the place cannot be looked at, what
    `open_storage` raises for what is no place at all.
    """
    given = where if isinstance(where, (str, os.PathLike)) else None
    text = os.fspath(given).rstrip("/") or os.fspath(given) if given is not None else ""
    options = None if given is None else options_for(given, options)
    own = [open_storage(text, storage_options=options)] if given is not None else []
    try:
        if isinstance(where, (str, os.PathLike)):
            yield _place(text, own, options)
        else:
            yield Place(where)
    except OSError as error:
        raise CheckpointLoadError(f"cannot look at {redact(text) or 'the storage'}: {error}") from error
    finally:
        for storage in own:
            storage.close()


def check_is_there(where: str) -> None:
    """`CheckpointNotFoundError` where there is nothing, not even an empty folder; other errors as of `opened`."""
    with opened(where):
        pass


def _place(text: str, storages: list[Storage], options: Mapping[str, object] | None) -> Place:
    names = storages[0].list()
    above, name = split_place(text)
    if above and (parse_step(name) is not None or parse_aside(name) is not None or MANIFEST in names or not names):
        storages.append(open_storage(above, storage_options=options))
        if names and not _is_file(storages[1], name):
            return Place(storages[1], name)
        if _is_file(storages[1], name):
            return Place(storages[1], "", name)
    if not names and not (isinstance(storages[0], LocalStorage) and os.path.isdir(storages[0].url)):
        raise CheckpointNotFoundError(f"there is nothing at {redact(text)}")
    return Place(storages[0])


def split_place(text: str) -> tuple[str, str]:
    """The place above and the last name; nothing above for what is a root by itself."""
    if "://" in text:
        protocol, _, rest = text.partition("://")
        above, slash, name = rest.rpartition("/")
        return (f"{protocol}://{above}" if slash and above else ""), name
    above, name = os.path.split(os.path.abspath(os.path.expanduser(text)))
    return above, name


def _is_file(storage: Storage, name: str) -> bool:
    try:
        storage.size(name)
    except (OSError, ValueError):
        return False
    return True
