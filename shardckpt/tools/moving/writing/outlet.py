"""Where a sink puts its files: a folder or one file by name, at any URL; all of them are there in the end, or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from shardckpt.errors import CheckpointSaveError
from shardckpt.storage.base import Buffer, RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.open import open_storage, options_for
from shardckpt.tools.place import Where, split_place


@dataclass(slots=True)
class Outlet:
    """Takes the files of one write. The last one put is the one that makes the others count."""

    storage: Storage
    url: str
    """What is being made, for people."""
    file: str = ""
    """The name that was asked for, if it was that of a file; else a folder is made."""
    _inside: str = ""
    _names: list[str] = field(default_factory=list)

    def put(self, name: str, parts: Iterable[Buffer]) -> int:
        """Write one file; gives its bytes."""
        try:
            nbytes = self.storage.put(self._key(name), parts)
        except FileExistsError:
            raise  # it is another's
        except BaseException:
            self._names.append(name)  # it may be there: only the answer is lost
            raise
        self._names.append(name)
        return nbytes

    def _key(self, name: str) -> str:
        return f"{self._inside}/{name}" if self._inside else name

    def _take_back(self) -> None:
        with suppress(OSError):
            if self._inside:
                self.storage.delete_tree(self._inside)
            else:
                self.storage.delete([self._key(name) for name in reversed(self._names)])


@contextmanager
def outlet(
    where: Where, *, endings: tuple[str, ...], storage_options: Mapping[str, object] | None = None
) -> Iterator[Outlet]:
    """What is put becomes known when the block ends, and is removed if it fails.

    A name with one of the endings is a file, which need not be alone in its folder; all else is a folder that must not
    be there, or be empty in an object store. On a local disk all is written in a temporary folder beside it, and then
    renamed; elsewhere files are put one by one under their names, each whole or not there.

    `CheckpointSaveError` if it is there already or cannot be written, `ValueError` for a bad URL.
    """
    with ExitStack() as stack:
        out, publish = _found(stack, where, endings, storage_options)
        try:
            yield out
            publish(out)
        except FileExistsError as error:
            out._take_back()
            raise CheckpointSaveError(f"{out.url} is there already ({error}): nothing was changed") from error
        except OSError as error:
            out._take_back()
            raise CheckpointSaveError(f"{out.url} was not written: {error}") from error
        except BaseException:
            out._take_back()
            raise


def names_file(where: Where, endings: tuple[str, ...]) -> bool:
    """Whether a place is meant as a file, by how its name ends."""
    return isinstance(where, (str, os.PathLike)) and os.fspath(where).rstrip("/").endswith(endings)


def _found(
    stack: ExitStack, where: Where, endings: tuple[str, ...], options: Mapping[str, object] | None
) -> tuple[Outlet, Callable[[Outlet], None]]:
    if not isinstance(where, (str, os.PathLike)):
        return _free(Outlet(where, where.url)), _nothing
    text = os.fspath(where)

    def opened(place: str) -> Storage:
        storage = open_storage(place, storage_options=options_for(place, options))
        stack.callback(storage.close)
        return storage

    above, name = split_place(text.rstrip("/"))
    is_file = names_file(where, endings)
    if not above or not name:
        if is_file or not name:
            raise ValueError(f"{text!r} has no folder above it: name one in which it is to be made")
        return _free(Outlet(storage := opened(text), storage.url)), _nothing
    parent = opened(above)
    url, fresh = f"{parent.url.rstrip('/')}/{name}", f"{name}.{secrets.token_hex(8)}.tmp"
    if is_file:
        inside = fresh if isinstance(parent, LocalStorage) else ""
        return _absent(Outlet(parent, url, name, inside), name), _link if inside else _nothing
    if isinstance(parent, RenamingStorage):
        return _absent(Outlet(parent, url, "", fresh), name), lambda out: parent.rename_folder(fresh, name)
    return _free(Outlet(storage := opened(text), storage.url)), _nothing


def _nothing(out: Outlet) -> None:
    """Files stand under their names already."""


def _link(out: Outlet) -> None:
    """Give the files their names beside the temporary folder: by hard links, which never replace what is there."""
    storage, given = out.storage, list[str]()
    assert isinstance(storage, LocalStorage)
    try:
        for name in out._names:
            os.link(storage.path_of(out._key(name)), storage.path_of(name))
            given.append(name)
    except BaseException:
        storage.delete(reversed(given))
        raise
    storage.sync_folder("")
    storage.delete_tree(out._inside)


def _absent(out: Outlet, name: str) -> Outlet:
    """`CheckpointSaveError` if there is a file or a folder of that name."""
    try:
        names = out.storage.list()
    except OSError as error:
        raise CheckpointSaveError(f"cannot look at {out.url}: {error}") from error
    if name in names or f"{name}/" in names:
        raise CheckpointSaveError(f"{out.url} is there already: name another place, or delete it first")
    return out


def _free(out: Outlet) -> Outlet:
    """`CheckpointSaveError` if there is anything."""
    try:
        names = out.storage.list()
    except OSError as error:
        raise CheckpointSaveError(f"cannot look at {out.url}: {error}") from error
    if names:
        raise CheckpointSaveError(f"{out.url} is there already and has {names[0]}: name another place, or empty it")
    return out
