"""Where a sink puts its files: a folder or one file by name, at any URL; all of them are there in the end, or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from shardckpt.errors import CheckpointSaveError
from shardckpt.storage.base import Buffer, RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.open import open_storage, options_for
from shardckpt.tools.exporting.scratch import Scratch, sweep
from shardckpt.tools.place import Where, split_place


@dataclass(slots=True)
class Outlet:
    """Takes the files of one write. The last one put is the one that makes the others count.

    `locate`, then `claim`, by one process; it writes, and `publish` or `take_back`; and in the end `close`.
    """

    storage: Storage
    url: str
    """What is being made, for people."""
    name: str = ""
    """Of what is made, in the storage; nothing if that is the storage itself."""
    is_file: bool = False
    """Whether that is a file; else a folder is made."""
    inside: str = ""
    """The folder in which all is written and then renamed; nothing where files are put under their names at once."""
    names: list[str] = field(default_factory=list)
    _owned: tuple[Storage, ...] = ()
    _scratch: Scratch | None = None

    @property
    def file(self) -> str:
        """The name that was asked for, if it was that of a file."""
        return self.name if self.is_file else ""

    @property
    def renames(self) -> bool:
        """Whether all is written in a folder beside it and then renamed."""
        return bool(self.name) and isinstance(self.storage, LocalStorage if self.is_file else RenamingStorage)

    @classmethod
    def locate(
        cls, where: Where, *, endings: tuple[str, ...], storage_options: Mapping[str, object] | None = None
    ) -> Outlet:
        """Where it will be; nothing is looked at yet. `ValueError` for a bad URL."""
        if not isinstance(where, (str, os.PathLike)):
            return cls(where, where.url)
        text = os.fspath(where)
        above, name = split_place(text.rstrip("/"))
        is_file = names_file(where, endings)
        if not above or not name:
            if is_file or not name:
                raise ValueError(f"{text!r} has no folder above it: name one in which it is to be made")
            storage = open_storage(text, storage_options=options_for(text, storage_options))
            return cls(storage, storage.url, _owned=(storage,))
        parent = open_storage(above, storage_options=options_for(above, storage_options))
        url = f"{parent.url.rstrip('/')}/{name}"
        if is_file or isinstance(parent, RenamingStorage):
            return cls(parent, url, name, is_file, _owned=(parent,))
        storage = open_storage(text, storage_options=options_for(text, storage_options))
        return cls(storage, storage.url, _owned=(parent, storage))

    def claim(self) -> None:
        """Look whether it is free, and begin. `CheckpointSaveError` if there is anything, or it cannot be looked at."""
        try:
            names = self.storage.list()
        except OSError as error:
            raise CheckpointSaveError(f"cannot look at {self.url}: {error}") from error
        if not self.name and names:
            raise CheckpointSaveError(
                f"{self.url} is there already and has {names[0]}: name another place, or empty it"
            )
        if self.name and not {self.name, f"{self.name}/"}.isdisjoint(names):
            raise CheckpointSaveError(f"{self.url} is there already: name another place, or delete it first")
        if isinstance(self.storage, LocalStorage) and self.renames:
            sweep(self.storage, self.name)
            self._scratch = Scratch(self.storage, self.name)
            self.inside = self._scratch.folder
        elif self.renames:
            self.inside = f"{self.name}.{secrets.token_hex(8)}.tmp"

    def put(self, name: str, parts: Iterable[Buffer]) -> int:
        """Write one file; gives its bytes."""
        try:
            nbytes = self.storage.put(self.key(name), parts)
        except FileExistsError:
            raise  # it is another's
        except BaseException:
            self.names.append(name)  # it may be there: only the answer is lost
            raise
        self.names.append(name)
        return nbytes

    def key(self, name: str) -> str:
        """Of a file that is being written."""
        return f"{self.inside}/{name}" if self.inside else name

    def publish(self) -> None:
        """Give the files their names. `FileExistsError` if somebody has taken them meanwhile."""
        if self.inside and self.is_file:
            self._link()
        elif self.inside:
            assert isinstance(self.storage, RenamingStorage)
            self.storage.rename_folder(self.inside, self.name)

    def take_back(self) -> None:
        """Remove what was written, as far as that can be done."""
        with suppress(OSError):
            if self.inside:
                self.storage.delete_tree(self.inside)
            else:
                self.storage.delete([self.key(name) for name in reversed(self.names)])

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.let_go()
            self._scratch = None
        for storage in self._owned:
            storage.close()

    def _link(self) -> None:
        """Give the files their names beside the temporary folder: by hard links, which never replace what is there."""
        storage, given = self.storage, list[str]()
        assert isinstance(storage, LocalStorage)
        try:
            for name in self.names:
                os.link(storage.path_of(self.key(name)), storage.path_of(name))
                given.append(name)
        except BaseException:
            storage.delete(reversed(given))
            raise
        storage.sync_folder("")
        storage.delete_tree(self.inside)


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
    out = Outlet.locate(where, endings=endings, storage_options=storage_options)
    try:
        with told_as_save_errors(out.url):
            out.claim()
            try:
                yield out
                out.publish()
            except BaseException:
                out.take_back()
                raise
    finally:
        out.close()


@contextmanager
def told_as_save_errors(url: str) -> Iterator[None]:
    """What a storage does not take is a `CheckpointSaveError`."""
    try:
        yield
    except FileExistsError as error:
        raise CheckpointSaveError(f"{url} is there already ({error}): nothing was changed") from error
    except OSError as error:
        raise CheckpointSaveError(f"{url} was not written: {error}") from error


def file_of(where: Where, endings: tuple[str, ...]) -> str:
    """The name of the file that is asked for; "" if it is a folder."""
    if not isinstance(where, (str, os.PathLike)) or not names_file(where, endings):
        return ""
    return split_place(os.fspath(where).rstrip("/"))[1]


def names_file(where: Where, endings: tuple[str, ...]) -> bool:
    """Whether a place is meant as a file, by how its name ends."""
    return isinstance(where, (str, os.PathLike)) and os.fspath(where).rstrip("/").endswith(endings)
