"""Recording what this process does to the files below a folder, at the seam of the system calls.

`os` and the C library that `shardckpt.storage.posix.syscalls` calls are replaced while a recorder is active, so what is
recorded is what the engine does, in all its threads, and nothing of it is imitated. One lock lies round each call and
the record of it: the order that is recorded is the one in which things happened.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from shardckpt.storage.posix import syscalls
from shardckpt.testing.crash.fakes import Libc, RawStream
from shardckpt.testing.crash.operations import ROOT, Change, Data, Entries, Mark, Operation, Recording, Size, Sync

_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is about to be made: its name ("fsync", "rename"), and the path that it is about."""

    name: str
    path: str
    is_folder: bool = False


LeaveOut = Callable[[Call], bool]
"""Whether this call is to be answered as if it had been done, and not done."""


@dataclass(slots=True)
class _Opened:
    node: int
    path: str
    writes: bool
    position: int = 0


class Recorder:
    """Watches one folder. `with` it once; several threads may work meanwhile.

    fsync itself is not passed on: what it would cost is of no interest here.
    """

    def __init__(
        self, folder: str, *, leave_out: LeaveOut = lambda call: False, exchanges: bool = True, streams: bool = False
    ) -> None:
        """`leave_out`: syncs that are only claimed. `exchanges=False`: renameat2 is not known. `streams`: files that
        `open` opens for writing are watched, too."""
        self.recording = Recording()
        self._folder = os.path.abspath(folder)
        self._leave_out, self._exchanges, self._streams = leave_out, exchanges, streams
        self._lock = threading.RLock()
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._opened: dict[int, _Opened] = {}
        self._scan(self._folder, ROOT)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Record what happens inside."""
        names = ("open", "close", "mkdir", "rename", "unlink", "rmdir", "fsync", "write", "pwrite", "pwritev", "lseek")
        calls: dict[str, Any] = {name: getattr(self, f"_{name}") for name in names}
        calls |= {"replace": self._rename, "remove": self._unlink, "fdatasync": self._fsync}
        calls["ftruncate"] = self._ftruncate
        with ExitStack() as stack:
            for name, call in calls.items():
                stack.enter_context(mock.patch.object(os, name, call))
            stack.enter_context(self._libc())
            for module in (io, builtins) if self._streams else ():
                stack.enter_context(mock.patch.object(module, "open", self._stream))
            yield self

    def begun(self, step: int, version: object) -> None:
        """From now on this version of the step may be found; None: the step may be missing."""
        self._add(Mark(step, version))

    def acknowledged(self, step: int, version: object) -> None:
        """The program has been told that it is done."""
        self._add(Mark(step, version, acknowledged=True))

    def _add(self, operation: Operation) -> None:
        with self._lock:
            self.recording.operations.append(operation)

    def _change(self, *changes: Change) -> None:
        for folder, name, node in changes:
            if node is None:
                self._names[folder].pop(name, None)
            else:
                self._names[folder][name] = node
        self._add(Entries(changes))

    def _new_node(self, *, is_folder: bool) -> int:
        node = len(self.recording.is_folder)
        self.recording.is_folder[node] = is_folder
        if is_folder:
            self._names[node] = {}
        return node

    def _scan(self, path: str, folder: int) -> None:
        record = self.recording
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            node = self._new_node(is_folder=entry.is_dir(follow_symlinks=False))
            self._names[folder][entry.name] = node
            if record.is_folder[node]:
                self._scan(entry.path, node)
            else:
                with open(entry.path, "rb") as file:
                    record.contents[node] = file.read()
        record.folders[folder] = dict(self._names[folder])

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str, str] | None:
        """Folder, name and path of an entry; None if it is not below the folder that is watched."""
        name = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(name):
            above = self._opened.get(dir_fd)
            if above is None:
                return None
            return self._walk(above.node, name, f"{above.path}/{name}")
        full = os.path.abspath(name)
        if not full.startswith(self._folder + "/"):
            return None
        below = full.removeprefix(self._folder + "/")
        return self._walk(ROOT, below, below)

    def _walk(self, folder: int, below: str, path: str) -> tuple[int, str, str] | None:
        *above, name = below.split("/")
        for part in above:
            found = self._names.get(folder, {}).get(part)
            if found is None:
                return None
            folder = found
        return (folder, name, path.removeprefix("/")) if folder in self._names else None

    # The calls. Each is made under the lock, and recorded if it has succeeded.

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            file = _real.open(path, flags, mode, dir_fd=dir_fd)
            self._opened.pop(file, None)
            if os.path.abspath(os.fsdecode(path)) == self._folder and dir_fd is None:
                self._opened[file] = _Opened(ROOT, "", False)
            elif place := self._place(path, dir_fd):
                folder, name, full = place
                node = self._names[folder].get(name)
                if node is None:
                    node = self._new_node(is_folder=False)
                    self._change((folder, name, node))
                elif flags & os.O_TRUNC:
                    self._add(Size(node, 0))
                self._opened[file] = _Opened(node, full, bool(flags & _WRITES))
            return file

    def _close(self, file: int) -> None:
        with self._lock:
            self._opened.pop(file, None)
            _real.close(file)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._lock:
            _real.mkdir(path, mode, dir_fd=dir_fd)
            if place := self._place(path, dir_fd):
                self._change((place[0], place[1], self._new_node(is_folder=True)))

    def _rename(self, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        with self._lock:
            _real.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._renamed(self._place(src, src_dir_fd), self._place(dst, dst_dir_fd))

    def _renamed(self, old: tuple[int, str, str] | None, new: tuple[int, str, str] | None) -> None:
        if old and new:
            self._change((old[0], old[1], None), (new[0], new[1], self._names[old[0]][old[1]]))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        with self._lock:
            _real.unlink(path, dir_fd=dir_fd)
            if place := self._place(path, dir_fd):
                self._change((place[0], place[1], None))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        with self._lock:
            _real.rmdir(path, dir_fd=dir_fd)
            if place := self._place(path, dir_fd):
                self._change((place[0], place[1], None))

    def _fsync(self, file: Any) -> None:
        with self._lock:
            opened = self._opened.get(file if isinstance(file, int) else file.fileno())
            if opened is None:
                _real.fsync(file)
            elif not self._leave_out(Call("fsync", opened.path, self.recording.is_folder[opened.node])):
                self._add(Sync(opened.node))

    def _written(self, file: int, buffers: list[Any], offset: int | None, done: int) -> int:
        opened = self._opened.get(file)
        if opened is not None and opened.writes:
            content = b"".join(bytes(buffer) for buffer in buffers)[:done]
            self._add(Data(opened.node, opened.position if offset is None else offset, content))
            opened.position += done if offset is None else 0
        return done

    def _write(self, file: int, data: Any) -> int:
        with self._lock:
            return self._written(file, [data], None, _real.write(file, data))

    def _pwrite(self, file: int, data: Any, offset: int) -> int:
        with self._lock:
            return self._written(file, [data], offset, _real.pwrite(file, data, offset))

    def _pwritev(self, file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        with self._lock:
            return self._written(file, buffers, offset, _real.pwritev(file, buffers, offset, flags))

    def _lseek(self, file: int, position: int, whence: int) -> int:
        with self._lock:
            at = _real.lseek(file, position, whence)
            if (opened := self._opened.get(file)) is not None:
                opened.position = at
            return at

    def _ftruncate(self, file: int, length: int) -> None:
        with self._lock:
            _real.ftruncate(file, length)
            if (opened := self._opened.get(file)) is not None:
                self._add(Size(opened.node, length))

    def _stream(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """`open`: a binary file below the folder that is opened for writing writes through `os.write`."""
        if isinstance(file, int) or "b" not in mode or "r" in mode or not self._place(file, None):
            return _real_stream(file, mode, *args, **kwargs)
        flags = os.O_CREAT | os.O_RDWR | (os.O_EXCL if "x" in mode else os.O_TRUNC)
        return io.BufferedWriter(RawStream(os.open(file, flags, 0o666)))

    @contextmanager
    def _libc(self) -> Iterator[None]:
        with mock.patch.object(syscalls, "_libc", return_value=Libc(self._renameat2, self._fallocate)):
            yield

    def _renameat2(self, old: int, source: bytes, new: int, target: bytes, flags: int) -> int:
        with self._lock:
            if not self._exchanges:
                ctypes.set_errno(errno.ENOSYS)
                return -1
            done = int(_real_libc().renameat2(old, source, new, target, flags))
            one, other = self._place(source, old), self._place(target, new)
            if done == 0 and one and other:
                if flags & syscalls.EXCHANGE:
                    first, second = self._names[one[0]][one[1]], self._names[other[0]][other[1]]
                    self._change((one[0], one[1], second), (other[0], other[1], first))
                else:
                    self._renamed(one, other)
            return done

    def _fallocate(self, file: int, mode: int, offset: int, nbytes: int) -> int:
        with self._lock:
            call = _real_libc().fallocate64
            call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
            done = int(call(file, mode, offset, nbytes))
            if done == 0 and (opened := self._opened.get(file)) is not None:
                self._add(Size(opened.node, offset + nbytes, grow=True))
            return done


class _Real:
    """The calls as they are when nobody records."""

    open, close, mkdir, rename, unlink, rmdir = os.open, os.close, os.mkdir, os.rename, os.unlink, os.rmdir
    fsync, write, pwrite, pwritev, ftruncate = os.fsync, os.write, os.pwrite, os.pwritev, os.ftruncate
    lseek = os.lseek


_real = _Real
_real_stream = io.open
_real_libc = syscalls._libc
