"""Files below a folder of this machine or of a mounted file system, by plain system calls."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal

from shardckpt.storage.base import Buffer, Read, check_folder, check_key
from shardckpt.storage.posix.choose import Chooser
from shardckpt.storage.posix.explain import explained
from shardckpt.storage.posix.folders import (
    let_go,
    open_folder,
    opened_folder,
    regular_or_folder,
    remove_tree,
    sync_descriptor,
)
from shardckpt.storage.posix.map import MappedFile
from shardckpt.storage.posix.read import read_runs
from shardckpt.storage.posix.syscalls import EXCHANGE, Entry, rename_new, renameat2
from shardckpt.storage.posix.write import METHODS, MethodName, WriteMethod

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a planted FIFO must not make open() wait
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SHARE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_AGAIN = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalStorage:
    """A folder as a `RenamingStorage`. The root is made when something is first put; it may be a symbolic link.

    Nothing is kept open between calls, so any thread may call, and children made by fork may, too. Modes of files and
    folders follow the umask. While a put is under way its file is visible under its key, and if the process is killed
    it stays there, cut off: this is why a checkpoint is written in a folder of its attempt and renamed when complete.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        write: WriteMethod | MethodName | Literal["auto"] = "auto",
        read_threads: int = 2,
    ) -> None:
        """`root` is made absolute now (a later chdir does not move it); nothing is created or opened yet.

        `write`: by which way; "auto" tries them all on the first large file, and keeps to the fastest.
        More than two read threads make cold reads slower and warm ones hardly faster on the disks measured so far.
        """
        self._root = os.path.abspath(os.path.expanduser(root))
        self._chooser = Chooser(None if write == "auto" else METHODS[write] if isinstance(write, str) else write)
        self._read_threads = read_threads

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r}, write={self.write_method.way!r})"

    @property
    def url(self) -> str:
        return self._root

    @property
    def write_method(self) -> WriteMethod:
        """What is used now."""
        return self._chooser.method

    def path_of(self, key: str) -> str:
        """The path of a key, for people and for tools that map files. Opening it by path follows links: check first."""
        return os.path.join(self._root, *check_key(key).split("/"))

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        what = f"cannot write {key!r} in {self._root}"
        with self._parent(key, what, create=True) as (folder, name):
            return self._write_new((folder, name), parts, what=what, publish=partial(sync_descriptor, folder))

    def replace(self, key: str, content: bytes) -> None:
        what = f"cannot replace {key!r} in {self._root}"
        with self._parent(key, what, create=True) as (folder, name):
            fresh = f"{name}.{secrets.token_hex(8)}.tmp"

            def publish() -> None:
                os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
                sync_descriptor(folder)

            self._write_new((folder, fresh), [content], what=what, publish=publish)

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        what = f"cannot write {key!r} in {self._root}"
        with self._parent(key, what, create=True) as (folder, name):
            with explained(what):
                file = os.open(name, _SHARE, 0o666, dir_fd=folder)
            try:
                again = partial(_open_again, (folder, name), file, what)
                with explained(what):
                    _file(os.fstat(file))
                return self._chooser.write(file, parts, reopen=again, what=what, offset=offset)
            finally:
                with explained(what):
                    os.close(file)  # NFS tells of a full disk here, too

    def _write_new(self, entry: Entry, parts: Iterable[Buffer], *, what: str, publish: Callable[[], None]) -> int:
        """Write and sync a file that must be new, then `publish` it; if anything fails, the entry is not there."""
        folder, name = entry
        with explained(what):
            file = os.open(name, _CREATE, 0o666, dir_fd=folder)
        try:
            try:
                again = partial(_open_again, (folder, name), file, what)
                nbytes = self._chooser.write(file, parts, reopen=again, what=what)
            finally:
                with explained(what):
                    os.close(file)  # NFS tells of a full disk here, too
            with explained(what):
                publish()
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise
        return nbytes

    def read(self, key: str) -> bytes:
        file = self._open_file(key)
        with explained(f"cannot read {key!r} in {self._root}"), open(file, "rb", buffering=0) as stream:
            return stream.readall()

    def read_into(self, reads: Sequence[Read]) -> None:
        read_runs(reads, opened=self._open_file, url=self._root, threads=self._read_threads)

    def lend(self, key: str) -> MappedFile:
        """The file, mapped (see `LendingStorage`); a link to a file is refused as it is when read."""
        return MappedFile(self._open_file(key), f"cannot read {key!r} in {self._root}")

    def size(self, key: str) -> int:
        what = f"cannot look at {key!r} in {self._root}"
        with self._parent(key, what) as (folder, name), explained(what):
            return _file(os.stat(name, dir_fd=folder, follow_symlinks=False)).st_size

    def list(self, prefix: str = "") -> list[str]:
        parts = _parts(check_folder(prefix))
        with explained(f"cannot list {prefix!r} in {self._root}"):
            try:
                with opened_folder(self._root, parts) as folder, os.scandir(folder) as entries:
                    return sorted(entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                return []  # no such folder; a file of that name is none

    def delete(self, keys: Iterable[str]) -> None:
        folders: dict[tuple[str, ...], list[str]] = {}
        for key in keys:
            *above, name = check_key(key).split("/")
            folders.setdefault(tuple(above), []).append(name)
        for parts, names in folders.items():
            what = f"cannot delete {'/'.join([*parts, names[0]])!r}{' and others' * (len(names) > 1)} in {self._root}"
            missing = suppress(FileNotFoundError, NotADirectoryError)
            with missing, explained(what), opened_folder(self._root, parts) as folder:
                for name in names:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
                # So that a record removed first is gone first after a power cut as well.
                sync_descriptor(folder)

    def delete_tree(self, prefix: str) -> None:
        what = f"cannot delete {prefix!r} in {self._root}"
        with suppress(FileNotFoundError), self._parent(check_folder(prefix), what) as (folder, name), explained(what):
            remove_tree(folder, name)
            sync_descriptor(folder)

    def close(self) -> None:
        """Nothing is held."""

    def make_folder(self, prefix: str, *, exist_ok: bool = False) -> None:
        what = f"cannot make the folder {prefix!r} in {self._root}"
        with self._parent(check_folder(prefix), what, create=True) as (folder, name), explained(what):
            try:
                os.mkdir(name, dir_fd=folder)
            except FileExistsError:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not (exist_ok and stat.S_ISDIR(found.st_mode)):
                    raise
            sync_descriptor(folder)

    def sync_folder(self, prefix: str) -> None:
        parts = _parts(check_folder(prefix))
        with (
            explained(f"cannot sync the folder {prefix!r} in {self._root}"),
            opened_folder(self._root, parts) as folder,
        ):
            sync_descriptor(folder)

    def rename_folder(self, source: str, target: str) -> None:
        what = f"cannot rename {source!r} to {target!r} in {self._root}"
        with self._two_folders(source, target, what) as (old, new), explained(what):
            rename_new(old, new)
            sync_descriptor(new[0])
            sync_descriptor(old[0])

    def exchange_folders(self, one: str, other: str) -> bool:
        what = f"cannot exchange {one!r} and {other!r} in {self._root}"
        with self._two_folders(one, other, what) as (first, second), explained(what):
            if not renameat2(first, second, EXCHANGE):
                return False
            sync_descriptor(first[0])
            sync_descriptor(second[0])
        return True

    def link(self, key: str, target: str) -> None:
        what = f"cannot link {key!r} in {self._root}"
        with self._parent(key, what, create=True) as (folder, name), explained(what):
            with suppress(FileNotFoundError):
                if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise FileExistsError(errno.EEXIST, "something is there that is no link")
            fresh = f"{name}.{secrets.token_hex(8)}.tmp"
            os.symlink(target, fresh, dir_fd=folder)
            try:
                os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(fresh, dir_fd=folder)
                raise

    def read_link(self, key: str) -> str | None:
        what = f"cannot look at {key!r} in {self._root}"
        try:
            with self._parent(key, what) as (folder, name), explained(what):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    return os.readlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        return None

    @contextmanager
    def _parent(self, key: str, what: str, *, create: bool = False) -> Iterator[Entry]:
        """The descriptor of the folder that holds `key`, and the key's last part."""
        *above, name = check_key(key).split("/")
        with explained(what):
            try:
                folder = open_folder(self._root, above, create=create)
            except NotADirectoryError as error:
                if create:
                    raise
                # A file stands where a folder would have to be: what was asked for cannot be there.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        try:
            yield folder, name
        finally:
            let_go(folder)

    @contextmanager
    def _two_folders(self, one: str, other: str, what: str) -> Iterator[tuple[Entry, Entry]]:
        """The entries of two keys, the first of which is a folder."""
        one, other = check_folder(one), check_folder(other)
        with self._parent(one, what) as first, self._parent(other, what) as second:
            with explained(what), opened_folder(self._root, one.split("/")):
                pass
            yield first, second

    def _open_file(self, key: str) -> int:
        """A new descriptor, for reading, of a regular file that is no link."""
        what = f"cannot open {key!r} in {self._root}"
        with self._parent(key, what) as (folder, name), explained(what):
            file = os.open(name, _READ, dir_fd=folder)
            try:
                _file(os.fstat(file))
            except BaseException:
                let_go(file)
                raise
        return file


def _parts(prefix: str) -> tuple[str, ...]:
    return tuple(prefix.split("/")) if prefix else ()


def _file(found: os.stat_result) -> os.stat_result:
    if stat.S_ISDIR(regular_or_folder(found).st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # there is a folder, but no object
    return found


def _open_again(entry: Entry, file: int, what: str, flags: int) -> int:
    """A second descriptor of the file that was just created, with more flags."""
    folder, name = entry
    with explained(what):
        again = os.open(name, _AGAIN | flags, dir_fd=folder)
        try:
            if os.path.samestat(os.fstat(again), os.fstat(file)):
                return again
        except BaseException:
            let_go(again)
            raise
    let_go(again)
    raise OSError(errno.ESTALE, f"{what}: another process has replaced the file while it was being written")
