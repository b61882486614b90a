"""Putting one object through fsspec so that it is published whole or not at all.

Never `with fs.open(path, "wb")`: leaving the block by an exception closes the file, and closing publishes what is
there so far.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from shardckpt.storage.base import Buffer
from shardckpt.storage.objects.backend import delete_objects, publishes_whole
from shardckpt.storage.objects.translate import service_codes
from shardckpt.storage.transfer.ranges import as_bytes

_log = logging.getLogger(__name__)
_SLICE_NBYTES = 8 << 20


def pipe_new(fs: Any, path: str, content: bytes) -> None:
    """Put in one call, with the condition that nothing is there if the back end offers one."""
    parameters = inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters
    if "mode" in parameters:
        fs.pipe_file(path, content, mode="create")
    elif "overwrite" in parameters:  # adlfs
        fs.pipe_file(path, content, overwrite=False)
    else:
        fs.pipe_file(path, content)


def refuses_to_replace(fs: Any, path: str) -> bool:
    """Whether the server honours that condition, found with a small object at `path`, which is made and removed."""
    with suppress(FileExistsError):  # refused by its own lost first try
        fs.pipe_file(path, b"1")
    try:
        pipe_new(fs, path, b"2")
    except FileExistsError:
        return True
    except Exception as error:
        if {"PreconditionFailed", "412"} & set(service_codes(error)):
            return True
        raise
    finally:
        delete_objects(fs, [path])
    return False


def pipe_over(fs: Any, path: str, content: bytes) -> None:
    """Put a small object in one call, whether or not one is there."""
    if not publishes_whole(fs):
        fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, content)


class Upload(Protocol):
    """An object that is being written; exactly one of `finish` and `abandon` ends it."""

    def write(self, data: memoryview) -> None: ...

    def finish(self) -> None:
        """Publish. If it raises, nothing was published, or it is unknown whether it was."""
        ...

    def abandon(self) -> None:
        """Leave nothing behind, as far as that can be done; raises nothing."""
        ...


class ObjectUpload:
    """A multipart upload by the back end's own buffered file (s3fs, gcsfs, adlfs)."""

    def __init__(self, fs: Any, path: str, *, part_nbytes: int) -> None:
        self._path = path
        self._file = _open_new(fs, path, block_size=part_nbytes)

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        try:
            self._file.discard()
        except Exception as error:
            # The parts that were sent stay in the bucket, unseen but paid for, until somebody sweeps them.
            _log.warning("an unfinished upload of %s could not be aborted (%s)", self._path, type(error).__name__)
        finally:
            self._file.closed = True  # or the garbage collector closes the file, and closing publishes it


class FileUpload:
    """A file written in its place, for back ends that are file systems (local, SFTP); removed if it fails."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        fs.makedirs(fs._parent(path), exist_ok=True)
        self._file = _open_new(fs, path)

    def write(self, data: memoryview) -> None:
        view = data
        while len(view):
            done = self._file.write(view)
            view = view[len(view) if done is None else done :]

    def finish(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        for step in (self._file.close, lambda: self._fs.rm_file(self._path)):
            try:
                step()
            except Exception as error:
                _log.warning("a half-written %s could not be removed (%s)", self._path, type(error).__name__)


def _open_new(fs: Any, path: str, **options: Any) -> Any:
    try:
        return fs.open(path, "xb", **options)
    except (NotImplementedError, ValueError):
        return fs.open(path, "wb", **options)  # knows no exclusive mode; the caller has looked whether it is there


def slices(parts: Iterable[Buffer]) -> Iterator[memoryview]:
    """The parts in pieces that a back end's buffer can take one after the other without growing large."""
    for part in parts:
        view = as_bytes(part)
        for start in range(0, len(view), _SLICE_NBYTES):
            yield view[start : start + _SLICE_NBYTES]


def start_upload(fs: Any, path: str, *, part_nbytes: int) -> Upload:
    """Begin an object that is too large to be put in one call."""
    return ObjectUpload(fs, path, part_nbytes=part_nbytes) if publishes_whole(fs) else FileUpload(fs, path)


def write_piece(upload: Upload, piece: memoryview, _: Any) -> None:
    """For a caller that hands the file system to all it does."""
    upload.write(piece)
