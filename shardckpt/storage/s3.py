"""S3 through s3fs: puts that recognise themselves, parts of one object from threads and ranks, ranges in flight.

s3fs is imported by whoever makes the file system; this module does not import it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from shardckpt.storage.base import Buffer, PutPart, Read, UploadId, check_folder, check_key
from shardckpt.storage.filesystem import FsspecStorage, checked
from shardckpt.storage.objects import requests
from shardckpt.storage.objects.direct import Direct
from shardckpt.storage.objects.parts import MOST, cut, nbytes_of, sizes
from shardckpt.storage.objects.writeonce import WriteOnce
from shardckpt.storage.retrying import RetryPolicy
from shardckpt.storage.transfer.amounts import Transfers
from shardckpt.storage.transfer.ranges import Run, as_bytes, merge
from shardckpt.storage.transfer.several import for_each
from shardckpt.storage.transfer.summing import sums_of

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MiB = 1 << 20

TRANSFERS = Transfers(
    whole_nbytes=16 * _MiB, part_nbytes=8 * _MiB, request_nbytes=8 * _MiB, wave_nbytes=64 * _MiB, concurrency=16
)
"""As measured on a server of this machine (benchmarks/objects.py): larger parts and more at a time gained nothing, nor
did obstore in the place of s3fs, where ranges go to their destinations as they come (2026-11)."""


ClientName: TypeAlias = Literal["s3fs", "direct"]
"""Who sends parts and fetches ranges: s3fs, or `Direct`, which takes less processor time."""


class _Bulk(Protocol):
    """The two requests that move nearly all bytes; each is one try."""

    def put_part(self, fs: Any, path: str, upload: str, number: int, content: memoryview) -> str: ...

    def get_range(
        self, fs: Any, path: str, offset: int, into: Sequence[memoryview], sums: list[int] | None = None
    ) -> int: ...


class S3Storage(FsspecStorage):
    """`root` in S3; also a `SharedPuts`. Every request is tried again while it fails for a passing reason.

    A put carries a stamp of its own as user metadata. Where the server refuses to create what is there (asked once, see
    `WriteOnce`), one of several racing puts wins, and one that was refused by its own lost answer finds its stamp.
    Elsewhere the key is looked at first and the stamp read back afterwards: the last of several racing puts wins, and
    the others are told, unless they had looked before it came.
    """

    def __init__(
        self,
        fs: Any,
        root: str,
        *,
        url: str | None = None,
        transfers: Transfers | None = None,
        retries: RetryPolicy | None = None,
        client: ClientName = "s3fs",
    ) -> None:
        """`fs` is an `s3fs.S3FileSystem`; else as for `FsspecStorage`. A put holds `wave_nbytes` in memory at most."""
        super().__init__(fs, root, url=url, transfers=transfers or TRANSFERS, retries=retries)
        self._write_once = WriteOnce(self._root)
        self._room: tuple[int, threading.Semaphore] | None = None
        self._direct = Direct() if client == "direct" else None

    def close(self) -> None:
        super().close()
        if self._direct is not None:
            self._direct.close()

    @property
    def _bulk(self) -> _Bulk:
        if self._direct is not None:
            return self._direct
        return requests

    def refuses_to_replace(self) -> bool:
        return self._write_once.of_puts(partial(self._call, f"cannot probe {self._url}"))

    def modified(self, key: str) -> float:
        """When the object was made: seconds since 1970, whole ones, by the server's clock."""
        path = self._path(key)
        return float(self._call(self._what("look at", key), lambda fs: fs.modified(path).timestamp()))

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        what = self._what("put", key)
        first, rest = self._gather(parts)
        if rest is not None:
            return self._put_in_parts(key, what, parts if isinstance(parts, Sequence) else chain(first, rest))
        content = first[0] if len(first) == 1 and isinstance(first[0], bytes) else b"".join(map(as_bytes, first))
        path, stamp = self._path(key), requests.new_stamp()
        refuses = self._write_once.of_puts(partial(self._call, what))
        if not refuses:
            self._check_free(key, what)
        self._publish(what, path, stamp, refuses, partial(_put_whole, path=path, content=content, stamp=stamp))
        return len(content)

    def _put_in_parts(self, key: str, what: str, parts: Iterable[Buffer]) -> int:
        self._check_free(key, what)  # better told now than after all parts
        upload = self.begin_upload(key)
        try:
            done = self.put_parts(key, upload, parts, numbers=range(1, MOST + 1))
            self.finish_upload(key, upload, done)
        except BaseException:
            self.abort_upload(key, upload)
            raise
        return sum(part.nbytes for part in done)

    def begin_upload(self, key: str) -> UploadId:
        what, path, stamp = self._what("begin to put", key), self._path(key), requests.new_stamp()
        upload = self._call(what, lambda fs: requests.start_upload(fs, path, stamp=stamp))
        return f"{stamp}/{upload}"

    def put_parts(
        self, key: str, upload: UploadId, parts: Iterable[Buffer], *, numbers: range, nbytes: int | None = None
    ) -> tuple[PutPart, ...]:
        what, path, name = self._what("put a part of", key), self._path(key), upload.partition("/")[2]
        transfers, done = self._transfers, list[PutPart]()
        total = nbytes if nbytes is not None else nbytes_of(parts)
        pieces = cut(parts, sizes(total, part_nbytes=transfers.part_nbytes, room=len(numbers)))

        def send(item: tuple[int, memoryview]) -> None:
            number, piece = item
            with self._in_flight():
                tag = self._call(what, lambda fs: self._bulk.put_part(fs, path, name, number, piece))
            done.append(PutPart(number, tag, len(piece)))

        for_each(zip(numbers, pieces, strict=False), send, threads=self._most)
        return tuple(sorted(done, key=lambda part: part.number))

    def finish_upload(self, key: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        what, path = self._what("put", key), self._path(key)
        stamp, _, number = upload.partition("/")
        refuses = self._write_once.of_uploads(partial(self._call, what))
        if not refuses:
            self._check_free(key, what)
        tags = [(part.number, part.tag) for part in parts]
        self._publish(what, path, stamp, refuses, partial(_finish, path=path, upload=number, tags=tags))

    def abort_upload(self, key: str, upload: UploadId) -> None:
        path, number = self._path(key), upload.partition("/")[2]
        try:
            self._call(self._what("give up", key), lambda fs: requests.abort_upload(fs, path, number))
        except OSError as error:
            if error.errno != errno.ECANCELED:  # it is over already
                # The parts that were sent stay in the bucket, unseen but paid for, until they are swept.
                _log.warning("an unfinished upload could not be aborted: %s", error)

    def list_uploads(self, prefix: str = "") -> list[tuple[str, UploadId]]:
        folder = checked(check_folder(prefix))
        above = f"{self._path(folder)}/"
        found = self._call(f"cannot list uploads below {folder!r} in {self._url}", partial(_uploads, path=above))
        root = f"{self._root}/"
        return sorted((path.removeprefix(root), f"/{number}") for path, number in found)

    def _publish(self, what: str, path: str, stamp: str, refuses: bool, publish: Callable[..., None]) -> None:
        """Do it, and be sure that what is there then is this put's; `FileExistsError` if it is another's."""
        try:
            self._call(what, partial(publish, new=refuses))
        except OSError as error:
            # A repetition may find its own first try, whose answer was lost: the object is there, the upload is gone.
            if not isinstance(error, FileExistsError) and error.errno != errno.ECANCELED:
                raise
            if self._stamp_of(what, path) != stamp:
                raise
        else:
            if not refuses and self._stamp_of(what, path) != stamp:
                raise OSError(errno.EEXIST, f"{what}: another writer has put it at the same time")

    def _stamp_of(self, what: str, path: str) -> str | None:
        with suppress(FileNotFoundError):
            return self._call(what, lambda fs: requests.look_at(fs, path).stamp)
        return None

    @property
    def _most(self) -> int:
        """How many parts may be in flight, of all uploads together: each is once more in memory."""
        return min(self._transfers.concurrency, max(1, self._transfers.wave_nbytes // self._transfers.part_nbytes))

    def _in_flight(self) -> threading.Semaphore:
        """That of this process: one inherited through fork may be held for ever."""
        room = self._room
        if room is None or room[0] != os.getpid():
            room = self._room = (os.getpid(), threading.Semaphore(self._most))
        return room[1]

    def _check_free(self, key: str, what: str) -> None:
        if self._is_there(key):
            raise OSError(errno.EEXIST, f"{what}: it is there already, and objects are write-once")

    def replace(self, key: str, content: bytes) -> None:
        path = self._path(key)
        self._call(self._what("replace", key), lambda fs: requests.put_object(fs, path, bytes(content), new=False))

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        what, path = self._what("replace", key), self._path(key)
        taken = OSError(errno.EEXIST, f"{what}: another writer has replaced it in the meantime")
        content, tag = self._call(what, lambda fs: requests.get_tagged(fs, path))
        if content != old:
            raise taken
        try:
            self._call(what, lambda fs: requests.put_over(fs, path, bytes(new), tag=tag))
        except FileExistsError:
            if self.read(key) != new:  # else it was refused by its own first try, whose answer was lost
                raise taken from None

    def read(self, key: str) -> bytes:
        path = self._path(key)
        return self._call(self._what("read", key), lambda fs: requests.get_object(fs, path))

    def read_into(self, reads: Sequence[Read]) -> None:
        self._get_all(reads, summed=False)

    def read_summed(self, reads: Sequence[Read]) -> list[int]:
        return sums_of(reads, self._get_all(reads, summed=True))

    def _get_all(self, reads: Sequence[Read], *, summed: bool) -> Iterator[tuple[int, int]]:
        """CRC and bytes of each buffer of each run, in order; none if they are not `summed`."""
        for read in reads:
            checked(check_key(read.key))
        runs = merge(reads, run_nbytes=self._transfers.request_nbytes, run_buffers=1 << 20)
        sums = [list[int]() if summed else None for _ in runs]
        for_each(zip(runs, sums, strict=True), self._get, threads=self._transfers.concurrency)
        found = ((run, own) for run, own in zip(runs, sums, strict=True) if own is not None)
        return ((crc, len(buffer)) for run, own in found for crc, buffer in zip(own, run.into, strict=True))

    def _get(self, wanted: tuple[Run, list[int] | None]) -> None:
        run, sums = wanted
        path = self._path(run.key)

        def get(fs: Any) -> int:
            try:
                return self._bulk.get_range(fs, path, run.offset, run.into, sums)
            except Exception as error:
                self._raise_if_too_short(run, error)
                raise

        have = self._call(self._what("read", run.key), get)
        if have < run.nbytes:
            raise run.ended_early(self._url, have=have)

    def size(self, key: str) -> int:
        path = self._path(key)
        return self._call(self._what("look at", key), lambda fs: requests.look_at(fs, path).nbytes)

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        path = self._path(folder)
        with suppress(FileNotFoundError):
            return self._call(f"cannot list {folder!r} in {self._url}", lambda fs: list(requests.list_folder(fs, path)))
        return []

    def delete_tree(self, prefix: str) -> None:
        """Uploads below it that are not finished are aborted, too."""
        folder = check_key(check_folder(prefix))
        for key, upload in self.list_uploads(folder):
            self.abort_upload(key, upload)
        super().delete_tree(folder)

    _delete_objects = staticmethod(requests.delete_objects)

    def _forget_folders(self, folders: Sequence[str]) -> None:
        """Some servers (SeaweedFS) go on to list a folder that is empty until its marker, "folder/", is deleted; also
        the one that these were in, which stays where there is something in it."""
        above = folders[0].rpartition("/")[0]
        for folder in [*reversed(folders), *([above] if above else [])]:
            with suppress(OSError):
                self._call(f"cannot delete {folder!r}", partial(requests.delete_marker, path=self._path(folder)))

    def _what(self, verb: str, key: str) -> str:
        return f"cannot {verb} {checked(check_key(key))!r} in {self._url}"


def _put_whole(fs: Any, *, path: str, content: bytes, stamp: str, new: bool) -> None:
    requests.put_object(fs, path, content, new=new, stamp=stamp)


def _finish(fs: Any, *, path: str, upload: str, tags: Sequence[tuple[int, str]], new: bool) -> None:
    requests.finish_upload(fs, path, upload, tags, new=new)


def _uploads(fs: Any, *, path: str) -> list[tuple[str, str]]:
    return list(requests.list_uploads(fs, path))
