"""Any fsspec file system as an object store: whole-object puts, ranged gets, no renames.

fsspec and its back ends are imported by whoever makes the file system; this module alone imports none of them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NoReturn, TypeAlias, TypeVar

from shardckpt.storage.base import Buffer, Read, check_folder, check_key
from shardckpt.storage.objects.backend import delete_objects, new_instance, protocols, publishes_whole
from shardckpt.storage.objects.secrecy import Redactor, redact
from shardckpt.storage.objects.translate import service_codes, translate
from shardckpt.storage.objects.upload import Upload, pipe_new, pipe_over, slices, start_upload
from shardckpt.storage.transfer.fingerprint import Fingerprint, fingerprint, stores
from shardckpt.storage.transfer.ranges import Run, as_bytes, merge

T = TypeVar("T")
_Entries: TypeAlias = list[tuple[str, bool]]

_MiB = 1 << 20
_DELETES_PER_CALL = 1000


@dataclass(frozen=True, slots=True)
class Transfers:
    """How large and how many: a put holds up to `whole_nbytes` once more in memory, a read up to `wave_nbytes`."""

    whole_nbytes: int = 128 * _MiB
    """Objects up to this size go out in one call of the back end, larger ones in parts."""
    part_nbytes: int = 32 * _MiB
    request_nbytes: int = 8 * _MiB
    """Longer ranges are read by several requests at once."""
    wave_nbytes: int = 128 * _MiB
    concurrency: int = 16


class FsspecStorage:
    """`root` in the fsspec file system `fs`. Any thread may call; in a child made by fork a new client is made.

    Write-once is as strong as the back end: with a conditional put one of several racing writers wins, without one the
    key is looked at first, and two that look at the same moment both write. Back ends that write files in place (SFTP)
    remove what an interrupted put left; a killed process leaves it.
    """

    def __init__(self, fs: Any, root: str, *, url: str | None = None, transfers: Transfers | None = None) -> None:
        """`fs` is an fsspec `AbstractFileSystem`, best made without listings cache; `url` is for people, if given."""
        # Not the file system itself: `close` must be able to let go of it.
        self._make = partial(new_instance, type(fs), tuple(fs.storage_args), dict(fs.storage_options))
        self._live: tuple[int, Any] | None = (os.getpid(), fs)
        self._inherited: tuple[int, Any] | None = None
        self._root = fs._strip_protocol(root).rstrip("/")
        shown = url if url is not None else fs.unstrip_protocol(self._root)
        self._redacted = Redactor(url=shown, options=[fs.storage_options, list(fs.storage_args)])
        self._url = self._redacted(redact(shown))
        self._transfers = transfers or Transfers()
        self._in_memory = "memory" in protocols(fs)
        self._remote = bool(fs.async_impl)
        self._whole = publishes_whole(fs)
        self._puts = threading.RLock()

    def __repr__(self) -> str:
        return f"FsspecStorage({self._url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a storage is not pickled, for it may hold credentials: open it anew from its URL")

    @property
    def url(self) -> str:
        return self._url

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        what = f"cannot put {_checked(check_key(key))!r} in {self._url}"
        if self._is_there(key):
            raise OSError(errno.EEXIST, f"{what}: it is there already, and objects are write-once")
        first, rest = self._gather(parts)
        if rest is not None:
            return self._put_in_parts(key, what, chain(first, rest))
        content = first[0] if len(first) == 1 and isinstance(first[0], bytes) else b"".join(map(as_bytes, first))
        try:
            # fsspec's memory file system looks and writes in two steps: one put at a time, at least of this instance.
            with self._puts if self._in_memory else nullcontext():
                self._call(what, lambda fs: pipe_new(fs, self._path(key), content))
        except FileExistsError:
            if not self._arrived(key, fingerprint([content])):
                raise
        return len(content)

    def _gather(self, parts: Iterable[Buffer]) -> tuple[list[Buffer], Iterator[Buffer] | None]:
        """The parts so far, and those to come if they are too much for one call."""
        if not self._whole:
            return [], iter(parts)
        gathered, nbytes, remaining = list[Buffer](), 0, iter(parts)
        for part in remaining:
            gathered.append(part)
            nbytes += memoryview(part).nbytes
            if nbytes > self._transfers.whole_nbytes and not self._in_memory:
                return gathered, remaining
        return gathered, None

    def _put_in_parts(self, key: str, what: str, parts: Iterable[Buffer]) -> int:
        path, part_nbytes = self._path(key), self._transfers.part_nbytes
        upload = self._call(what, lambda fs: start_upload(fs, path, part_nbytes=part_nbytes))
        sent = Fingerprint()
        try:
            for piece in slices(parts):
                self._call(what, partial(_write, upload, piece))
                sent = sent.extended(piece)
            self._call(what, lambda _: upload.finish())
        except BaseException as error:
            upload.abandon()
            if isinstance(error, FileExistsError) and self._arrived(key, sent):
                return sent.nbytes
            raise
        return sent.nbytes

    def _arrived(self, key: str, content: Fingerprint) -> bool:
        """Whether a refused put is there all the same.

        The key was not there when the put began. So either another writer came in between, or the client of the back
        end has lost the answer to our put, repeated it by itself, and been refused by its own first try.
        """
        return self._remote and stores(self, key, content)

    def replace(self, key: str, content: bytes) -> None:
        """As atomic as a put of the back end: object stores show the old or the new; SFTP and the like may tear."""
        what = f"cannot replace {_checked(check_key(key))!r} in {self._url}"
        with self._puts if self._in_memory else nullcontext():
            self._call(what, lambda fs: pipe_over(fs, self._path(key), bytes(content)))

    def read(self, key: str) -> bytes:
        what = f"cannot read {_checked(check_key(key))!r} in {self._url}"

        def fetch(fs: Any) -> bytes:
            with _absent_if_no_file(key):
                return bytes(fs.cat_file(self._path(key)))

        return self._call(what, fetch)

    def read_into(self, reads: Sequence[Read]) -> None:
        runs = iter(merge(reads, run_nbytes=self._transfers.request_nbytes, run_buffers=1 << 20))
        at_once = max(1, self._transfers.wave_nbytes // self._transfers.request_nbytes)
        # cat_ranges gives all its answers together: waves bound the memory that they take.
        while wave := list(islice(runs, at_once)):
            for run, answer in zip(wave, self._fetch(wave), strict=True):
                _scatter(run, answer, self._url)

    def _fetch(self, runs: Sequence[Run]) -> list[bytes]:
        what = f"cannot read {runs[0].key!r}{' and others' * (len(runs) > 1)} in {self._url}"
        paths = [self._path(_checked(check_key(run.key))) for run in runs]
        options = {"batch_size": self._transfers.concurrency} if self._remote else {}
        starts, ends = [run.offset for run in runs], [run.end for run in runs]
        # Errors are asked for as values, to know which range each belongs to.
        answers = self._call(what, lambda fs: fs.cat_ranges(paths, starts, ends, on_error="return", **options))
        for run, answer in zip(runs, answers, strict=True):
            if isinstance(answer, Exception):
                self._raise_for(run, answer)
        return list(answers)

    def _raise_for(self, run: Run, error: Exception) -> NoReturn:
        if {"InvalidRange", "416"} & set(service_codes(error)):
            raise run.ended_early(self._url, have=self.size(run.key) - run.offset)
        if isinstance(error, IsADirectoryError | NotADirectoryError):
            error = FileNotFoundError(run.key)
        raise translate(error, f"cannot read {run.key!r} in {self._url}", self._redacted)

    def size(self, key: str) -> int:
        what = f"cannot look at {_checked(check_key(key))!r} in {self._url}"

        def look(fs: Any) -> int:
            fs.invalidate_cache(self._path(key))  # for file systems that were made with a listings cache
            with _absent_if_no_file(key):
                info = fs.info(self._path(key))
            if info["type"] != "file":
                raise FileNotFoundError(key)
            return int(info["size"])

        return self._call(what, look)

    def _is_there(self, key: str) -> bool:
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        return sorted(name + "/" * is_folder for name, is_folder in self._entries(_checked(check_folder(prefix))))

    def _entries(self, folder: str) -> _Entries:
        """Names directly below a folder, and whether each is a folder; a link to a folder is none."""
        path = self._path(folder)

        def look(fs: Any) -> _Entries:
            fs.invalidate_cache(path)
            above = fs._strip_protocol(path).rstrip("/") + "/"
            found = [(str(info["name"]).rstrip("/"), info) for info in fs.ls(path or "/", detail=True)]
            return [
                (name.removeprefix(above), info["type"] == "directory" and not info.get("islink", False))
                for name, info in found
                # Not the folder itself: some stores list a marker for it.
                if name.startswith(above) and "/" not in name.removeprefix(above)
            ]

        with suppress(FileNotFoundError, NotADirectoryError):
            return self._call(f"cannot list {folder!r} in {self._url}", look)
        return []

    def delete(self, keys: Iterable[str]) -> None:
        paths = iter([self._path(_checked(check_key(key))) for key in keys])
        while batch := list(islice(paths, _DELETES_PER_CALL)):
            what = f"cannot delete {len(batch)} objects in {self._url}, the first of them {batch[0]!r}"
            self._call(what, partial(delete_objects, paths=batch))

    def delete_tree(self, prefix: str) -> None:
        folders, keys = [_checked(check_key(check_folder(prefix)))], list[str]()
        for folder in folders:  # grows as it goes
            for name, is_folder in self._entries(folder):
                (folders if is_folder else keys).append(f"{folder}/{name}")
        self.delete(keys)
        if not self._remote:
            for folder in reversed(folders):
                with suppress(OSError):
                    self._call(f"cannot delete {folder!r}", partial(_remove_folder, path=self._path(folder)))

    def close(self) -> None:
        """Give back the client with its connections. A later call makes a new one."""
        if not self._in_memory:
            self._live = None

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _client(self) -> Any:
        """The file system of this process: one inherited through fork must not be used, its event loop has no thread.

        No lock: one held at the moment of the fork would stay held in the child for ever. Two threads that come at the
        same time make two clients, and one is dropped.
        """
        live = self._live
        if live is not None and live[0] != os.getpid() and not self._in_memory:
            # Kept, for giving it back would wait for the event loop that this process does not have.
            self._inherited, live = live, None
        if live is None:
            live = self._live = (os.getpid(), self._make())
        return live[1]

    def _call(self, what: str, work: Callable[[Any], T]) -> T:
        try:
            return work(self._client())
        except EOFError:
            raise
        except Exception as error:
            translated = translate(error, what, self._redacted)
        raise translated


def _checked(key: str) -> str:
    if "?versionId=" in key:
        raise ValueError(f"{key!r} is not a storage key here: s3fs would cut off what follows '?'")
    return key


@contextmanager
def _absent_if_no_file(key: str) -> Iterator[None]:
    """A folder of that name, or a file where a folder would have to be: the object is not there."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(key) from error


def _scatter(run: Run, answer: bytes, url: str) -> None:
    if len(answer) < run.nbytes:
        raise run.ended_early(url, have=len(answer))
    source, start = memoryview(answer), 0
    for buffer in run.into:
        buffer[:] = source[start : start + len(buffer)]
        start += len(buffer)


def _write(upload: Upload, piece: memoryview, _: Any) -> None:
    upload.write(piece)


def _remove_folder(fs: Any, path: str) -> None:
    fs.rmdir(path)
