"""Storages in the memory of this process: the reference of the seam, for tests and for ranks that are threads."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardckpt.storage.base import Buffer, PutPart, Read, UploadId, check_folder, check_key
from shardckpt.storage.transfer.ranges import as_bytes


@dataclass(frozen=True, slots=True)
class ReadCount:
    """What was read from a storage so far: bytes, and single reads (a `Read` of `read_into` counts as one)."""

    nbytes: int = 0
    requests: int = 0


class _Memory:
    """Keys and bytes; folders are only implied by keys."""

    def __init__(self, name: str = "") -> None:
        """`name` tells instances apart in messages."""
        self._url = f"mem://{name}"
        self._lock = threading.RLock()
        self._objects: dict[str, bytes] = {}
        self._reads = ReadCount()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    @property
    def url(self) -> str:
        return self._url

    @property
    def reads(self) -> ReadCount:
        """Counts over the life of the instance, failed reads not included."""
        with self._lock:
            return self._reads

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        self._check_free(check_key(key))
        # Not under the lock: filling the parts may take long, and may use this storage.
        content = b"".join(map(as_bytes, parts))
        with self._lock:
            self._check_free(key)
            self._objects[key] = content
        return len(content)

    def read(self, key: str) -> bytes:
        with self._lock:
            content = self._get(key)
            self._count(len(content), 1)
        return content

    def read_into(self, reads: Sequence[Read]) -> None:
        for read in reads:
            if not (wanted := memoryview(read.into).nbytes):
                continue
            with self._lock:
                content = self._get(read.key)
            piece = content[read.offset : read.offset + wanted]
            if len(piece) < wanted:
                raise EOFError(
                    f"{read.key!r} in {self._url} ends too early: bytes {read.offset} to {read.offset + wanted} were "
                    f"asked for, and it has {len(content)}; the object is truncated"
                )
            as_bytes(read.into)[:] = piece
            self._count(wanted, 1)

    def size(self, key: str) -> int:
        with self._lock:
            return len(self._get(key))

    def list(self, prefix: str = "") -> list[str]:
        folder = _folder(prefix)
        with self._lock:
            below = [path.removeprefix(folder) for path in self._paths() if path.startswith(folder)]
        return sorted({name + slash for name, slash, _ in (path.partition("/") for path in below) if name})

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._lock:
                self._objects.pop(check_key(key), None)

    def delete_tree(self, prefix: str) -> None:
        folder = check_key(check_folder(prefix)) + "/"
        with self._lock:
            for key in [key for key in self._objects if key.startswith(folder)]:
                del self._objects[key]

    def replace(self, key: str, content: bytes) -> None:
        with self._lock:
            self._objects[check_key(key)] = bytes(content)

    def close(self) -> None:
        """The content stays: another rank may use the same instance."""

    def _paths(self) -> Iterable[str]:
        """All keys; folders end in "/". Under the lock."""
        return list(self._objects)

    def _check_free(self, key: str) -> None:
        with self._lock:
            if key in self._objects:
                raise self._error(errno.EEXIST, key, "it is there already, and objects are write-once")

    def _get(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise self._error(errno.ENOENT, key, "it is not there") from None

    def _count(self, nbytes: int, requests: int) -> None:
        with self._lock:
            self._reads = ReadCount(self._reads.nbytes + nbytes, self._reads.requests + requests)

    def _error(self, code: int, key: str, advice: str) -> OSError:
        return OSError(code, f"{os.strerror(code)}: {key!r} in {self._url}: {advice}")


class MemoryObjects(_Memory):
    """An object store, also a `SharedPuts`. One instance may serve many threads."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._uploads: dict[UploadId, tuple[str, dict[PutPart, bytes]]] = {}

    def begin_upload(self, key: str) -> UploadId:
        upload = uuid.uuid4().hex
        with self._lock:
            self._uploads[upload] = (check_key(key), {})
        return upload

    def put_parts(
        self, key: str, upload: UploadId, parts: Iterable[Buffer], *, numbers: range, nbytes: int | None = None
    ) -> tuple[PutPart, ...]:
        content = b"".join(map(as_bytes, parts))
        part = PutPart(numbers[0], uuid.uuid4().hex, len(content))
        with self._lock:
            self._parts(key, upload)[part] = content
        return (part,)

    def finish_upload(self, key: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        with self._lock:
            put = self._parts(key, upload)
            if not set(parts) <= set(put):
                raise self._error(errno.EINVAL, key, "a part was never put")
            self._check_free(key)
            self._objects[key] = b"".join(put[part] for part in sorted(parts, key=lambda part: part.number))
            del self._uploads[upload]

    def abort_upload(self, key: str, upload: UploadId) -> None:
        with self._lock:
            self._uploads.pop(upload, None)

    def list_uploads(self, prefix: str = "") -> list[tuple[str, UploadId]]:
        folder = _folder(prefix)
        with self._lock:
            return sorted((key, upload) for upload, (key, _) in self._uploads.items() if key.startswith(folder))

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        with self._lock:
            if self._get(key) != old:
                raise self._error(errno.EEXIST, key, "another writer has replaced it")
            super().replace(key, new)

    def delete_tree(self, prefix: str) -> None:
        with self._lock:
            for key, upload in self.list_uploads(prefix):
                self.abort_upload(key, upload)
            super().delete_tree(prefix)

    def _parts(self, key: str, upload: UploadId) -> dict[PutPart, bytes]:
        """Under the lock."""
        begun, parts = self._uploads.get(upload, ("", {}))
        if begun != check_key(key):
            raise self._error(errno.ECANCELED, key, "the upload in parts is over, or was never begun")
        return parts


class MemoryStorage(_Memory):
    """A file system: folders are real, and are renamed atomically. One instance may serve many threads."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._folders: set[str] = set()  # each ends in "/"; the root is not among them

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        with self._lock:
            self._make_folders(check_key(key).rpartition("/")[0])
        return super().put(key, parts)

    def delete_tree(self, prefix: str) -> None:
        folder = check_key(check_folder(prefix)) + "/"
        with self._lock:
            super().delete_tree(prefix)
            self._objects.pop(folder[:-1], None)
            self._folders = {path for path in self._folders if not path.startswith(folder)}

    def make_folder(self, prefix: str, *, exist_ok: bool = False) -> None:
        folder = check_key(check_folder(prefix))
        with self._lock:
            if folder in self._objects or (folder + "/" in self._folders and not exist_ok):
                raise self._error(errno.EEXIST, prefix, "it is there already")
            self._make_folders(folder)

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        content = b"".join(map(as_bytes, parts))
        with self._lock:
            if check_key(key) + "/" in self._folders:
                raise self._error(errno.EISDIR, key, "a folder has that name")
            self._make_folders(key.rpartition("/")[0])
            whole = bytearray(self._objects.get(key, b""))
            whole.extend(bytes(max(0, offset + len(content) - len(whole))))
            whole[offset : offset + len(content)] = content
            self._objects[key] = bytes(whole)
        return len(content)

    def sync_folder(self, prefix: str) -> None:
        with self._lock:
            if prefix:
                self._check_folder(prefix)

    def rename_folder(self, source: str, target: str) -> None:
        with self._lock:
            old, new = self._check_folder(source), check_key(check_folder(target))
            if new in self._objects or new + "/" in self._folders:
                raise self._error(errno.EEXIST, target, "it is there already")
            if "/" in new:
                self._check_folder(new.rpartition("/")[0])
            if (new + "/").startswith(old):
                raise self._error(errno.EINVAL, target, f"it lies in {source!r} itself")
            self._move({old: new + "/"})

    def exchange_folders(self, one: str, other: str) -> bool:
        with self._lock:
            first, second = self._check_folder(one), self._check_folder(other)
            if first.startswith(second) or second.startswith(first):
                raise self._error(errno.EINVAL, other, f"one of it and {one!r} lies in the other")
            self._move({first: second, second: first})
        return True

    def replace(self, key: str, content: bytes) -> None:
        with self._lock:
            if check_key(key) + "/" in self._folders:
                raise self._error(errno.EISDIR, key, "a folder has that name")
            self._make_folders(key.rpartition("/")[0])
            super().replace(key, content)

    def _paths(self) -> Iterable[str]:
        return [*self._objects, *self._folders]

    def _check_free(self, key: str) -> None:
        super()._check_free(key)
        with self._lock:
            if key + "/" in self._folders:
                raise self._error(errno.EEXIST, key, "a folder has that name")

    def _check_folder(self, prefix: str) -> str:
        folder = check_key(check_folder(prefix)) + "/"
        if folder not in self._folders:
            raise self._error(errno.ENOENT, prefix, "there is no such folder")
        return folder

    def _make_folders(self, path: str) -> None:
        parts = path.split("/") if path else []
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if folder in self._objects:
                raise self._error(errno.ENOTDIR, path, f"{folder!r} is a file")
            self._folders.add(folder + "/")

    def _move(self, moves: dict[str, str]) -> None:
        def moved(path: str) -> str:
            return next((new + path.removeprefix(old) for old, new in moves.items() if path.startswith(old)), path)

        self._objects = {moved(key): content for key, content in self._objects.items()}
        self._folders = {moved(folder) for folder in self._folders}


def _folder(prefix: str) -> str:
    return check_folder(prefix) + "/" if prefix else ""
