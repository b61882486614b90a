"""Any fsspec file system as an object store: whole-object puts, ranged gets, no renames.

fsspec and its back ends are imported by whoever makes the file system; this module alone imports none of them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain, islice
from operator import methodcaller
from typing import Any, NoReturn, TypeAlias, TypeVar

from shardckpt.storage.base import Buffer, Read, check_folder, check_key
from shardckpt.storage.objects import upload as uploads
from shardckpt.storage.objects.backend import delete_objects, new_instance, protocols, publishes_whole, tries_of
from shardckpt.storage.objects.probe import new_probe
from shardckpt.storage.objects.secrecy import Redactor, redact
from shardckpt.storage.objects.translate import absent_if_no_file, service_codes, translate
from shardckpt.storage.retrying import Retrier, RetryPolicy
from shardckpt.storage.transfer.amounts import Transfers
from shardckpt.storage.transfer.deleting import DeletePace
from shardckpt.storage.transfer.fingerprint import Fingerprint, fingerprint, stores
from shardckpt.storage.transfer.ranges import Run, as_bytes, merge

T = TypeVar("T")
_Entries: TypeAlias = list[tuple[str, bool]]


class FsspecStorage:
    """`root` in the fsspec file system `fs`. Any thread may call; in a child made by fork a new client is made.

    Write-once is as strong as the back end: with a conditional put (a remote one is asked once whether it has that) one
    of several racing writers wins; without one the key is looked at first, and what was put in one call is read back:
    who was overwritten is told, unless the other came later still. Back ends that write files in place (SFTP)
    remove what an interrupted put left; a killed process leaves it.
    """

    def __init__(
        self,
        fs: Any,
        root: str,
        *,
        url: str | None = None,
        transfers: Transfers | None = None,
        retries: RetryPolicy | None = None,
    ) -> None:
        """`fs` is an fsspec `AbstractFileSystem`, best made without listings cache; `url` is for people, if given."""
        # Not the file system itself: `close` must be able to let go of it.
        self._make = partial(new_instance, type(fs), tuple(fs.storage_args), dict(fs.storage_options), tries_of(fs))
        self._retrier = Retrier(retries)
        self._live: tuple[int, Any] | None = (os.getpid(), fs)
        self._inherited: tuple[int, Any] | None = None
        self._root = fs._strip_protocol(root).rstrip("/")
        shown = url if url is not None else fs.unstrip_protocol(self._root)
        self._redacted = Redactor(url=shown, options=[fs.storage_options, list(fs.storage_args)])
        self._url = self._redacted(redact(shown))
        self._transfers = transfers or Transfers()
        self._deletes = DeletePace(self._transfers.deletes_per_second)
        self._in_memory = "memory" in protocols(fs)
        self._remote = bool(fs.async_impl)
        self._whole = publishes_whole(fs)
        self._puts = threading.RLock()
        self._refuses: bool | None = None if self._remote and self._whole else True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a storage is not pickled, for it may hold credentials: open it anew from its URL")

    @property
    def url(self) -> str:
        return self._url

    @property
    def retries(self) -> int:
        """How many tries were made beyond the first ones, over all requests and threads; none of a client's own."""
        return self._retrier.retries

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        what = f"cannot put {checked(check_key(key))!r} in {self._url}"
        if self._is_there(key):
            raise OSError(errno.EEXIST, f"{what}: it is there already, and objects are write-once")
        first, rest = self._gather(parts)
        if rest is not None:
            return self._put_in_parts(key, what, chain(first, rest))
        content = first[0] if len(first) == 1 and isinstance(first[0], bytes) else b"".join(map(as_bytes, first))
        try:
            # fsspec's memory file system looks and writes in two steps: one put at a time, at least of this instance.
            with self._puts if self._in_memory else nullcontext():
                self._call(what, lambda fs: uploads.pipe_new(fs, self._path(key), content))
        except FileExistsError:
            if not self._arrived(key, fingerprint([content])):
                raise
        if not self.refuses_to_replace() and not stores(self, key, fingerprint([content])):
            raise OSError(errno.EEXIST, f"{what}: another writer has put it at the same time")
        return len(content)

    def refuses_to_replace(self) -> bool:
        """Whether a put of what is there is refused by the place itself; remote ones are asked once."""
        if self._refuses is None:
            path = f"{self._root}/{new_probe()}"
            self._refuses = self._call(f"cannot probe {self._url}", lambda fs: uploads.refuses_to_replace(fs, path))
        return self._refuses

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
        upload = self._call(what, lambda fs: uploads.start_upload(fs, path, part_nbytes=part_nbytes))
        sent = Fingerprint()
        try:
            for piece in uploads.slices(parts):
                self._call(what, partial(uploads.write_piece, upload, piece), again=False)
                sent = sent.extended(piece)
            self._call(what, lambda _: upload.finish(), again=False)
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
        what = f"cannot replace {checked(check_key(key))!r} in {self._url}"
        with self._puts if self._in_memory else nullcontext():
            self._call(what, lambda fs: uploads.pipe_over(fs, self._path(key), bytes(content)))

    def read(self, key: str) -> bytes:
        what = f"cannot read {checked(check_key(key))!r} in {self._url}"

        def fetch(fs: Any) -> bytes:
            with absent_if_no_file(key):
                return bytes(fs.cat_file(self._path(key)))

        return self._call(what, fetch)

    def read_into(self, reads: Sequence[Read]) -> None:
        runs = iter(merge(reads, run_nbytes=self._transfers.request_nbytes, run_buffers=1 << 20))
        at_once = max(1, self._transfers.wave_nbytes // self._transfers.request_nbytes)
        # cat_ranges gives all its answers together: waves bound the memory that they take.
        while wave := list(islice(runs, at_once)):
            for run, answer in zip(wave, self._fetch(wave), strict=True):
                run.fill(answer, url=self._url)

    def _fetch(self, runs: Sequence[Run]) -> list[bytes]:
        what = f"cannot read {runs[0].key!r}{' and others' * (len(runs) > 1)} in {self._url}"
        paths = [self._path(checked(check_key(run.key))) for run in runs]
        options = {"batch_size": self._transfers.concurrency} if self._remote else {}
        starts, ends = [run.offset for run in runs], [run.end for run in runs]

        def fetch() -> list[bytes]:
            # Errors are asked for as values, to know which range each belongs to.
            answers = self._try(what, lambda fs: fs.cat_ranges(paths, starts, ends, on_error="return", **options))
            for run, answer in zip(runs, answers, strict=True):
                if isinstance(answer, Exception):
                    self._raise_for(run, answer)
            return list(answers)

        return self._retrier.call(fetch, what=what)

    def _raise_for(self, run: Run, error: Exception) -> NoReturn:
        self._raise_if_too_short(run, error)
        if isinstance(error, IsADirectoryError | NotADirectoryError):
            error = FileNotFoundError(run.key)
        raise translate(error, f"cannot read {run.key!r} in {self._url}", self._redacted)

    def _raise_if_too_short(self, run: Run, error: Exception) -> None:
        if {"InvalidRange", "416"} & set(service_codes(error)):
            raise run.ended_early(self._url, have=self.size(run.key) - run.offset)

    def size(self, key: str) -> int:
        what = f"cannot look at {checked(check_key(key))!r} in {self._url}"

        def look(fs: Any) -> int:
            fs.invalidate_cache(self._path(key))  # for file systems that were made with a listings cache
            with absent_if_no_file(key):
                info = fs.info(self._path(key))
            if info["type"] != "file":
                raise FileNotFoundError(key)
            return int(info["size"])

        return self._call(what, look)

    def _is_there(self, key: str) -> bool:
        with suppress(FileNotFoundError):
            return self.size(key) >= 0
        return False

    def list(self, prefix: str = "") -> list[str]:
        return sorted(name + "/" * is_folder for name, is_folder in self._entries(checked(check_folder(prefix))))

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
        for batch in self._deletes.batches([self._path(checked(check_key(key))) for key in keys]):
            what = f"cannot delete {len(batch)} objects in {self._url}, the first of them {batch[0]!r}"
            self._call(what, partial(self._deletes.request, self._delete_objects, paths=batch))

    _delete_objects = staticmethod(delete_objects)

    def delete_tree(self, prefix: str) -> None:
        folders, keys = [checked(check_key(check_folder(prefix)))], list[str]()
        for folder in folders:  # grows as it goes
            for name, is_folder in self._entries(folder):
                (folders if is_folder else keys).append(f"{folder}/{name}")
        self.delete(keys)
        self._forget_folders(folders)

    def _forget_folders(self, folders: Sequence[str]) -> None:
        """Remove folders that are empty now, where they are real; those inside others come last in the list."""
        for folder in () if self._remote else reversed(folders):
            with suppress(OSError):
                self._call(f"cannot delete {folder!r}", methodcaller("rmdir", self._path(folder)))

    def close(self) -> None:
        """Give back the client with its connections; what waits to be tried again fails. A later call connects anew."""
        self._retrier.stop(for_good=False)
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

    def _call(self, what: str, work: Callable[[Any], T], *, again: bool = True) -> T:
        """Do it with the client; `again`: as often as it takes, while it fails for a passing reason."""
        return self._retrier.call(lambda: self._try(what, work), what=what) if again else self._try(what, work)

    def _try(self, what: str, work: Callable[[Any], T]) -> T:
        try:
            return work(self._client())
        except EOFError:
            raise
        except Exception as error:
            translated = translate(error, what, self._redacted)
        raise translated


def checked(key: str) -> str:
    """Give the key back, or raise `ValueError` if a back end would read more into it than a name."""
    if "?versionId=" in key:
        raise ValueError(f"{key!r} is not a storage key here: s3fs would cut off what follows '?'")
    return key
