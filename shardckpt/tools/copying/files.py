"""The bytes of a step from one storage to another: in windows of a fixed size, several in flight, summed on the way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice

from shardckpt.engine.writing.blobs import Blobs
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.checksum import crc32
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Read, Storage

_WINDOW = 8 << 20
"""Bytes that are read by one request, and held until they are written."""
_AHEAD = 4
"""Windows of a large file that are read while others are written."""
_LARGE_AT_ONCE = 2
_SMALL_AT_ONCE = 16
"""Files of at most one window: what they take is round trips."""


@dataclass(frozen=True, slots=True)
class Way:
    """From the folder of a step to the folder of its copy."""

    source: Storage
    source_folder: str
    target: Storage
    target_folder: str
    told: Callable[[int], None]
    """Called with the number of bytes whenever some have been copied; by any thread."""


def copy_blob(way: Way, pair: tuple[FileEntry, FileEntry]) -> FileEntry:
    """The entry of a file that steps share, with its blob at the target, which may be there already."""
    source, target = pair
    digest = source.blob.split("/")[1]
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="shardckpt-copy-read") as readers:
        parts = _windows(way, source, readers, threading.Event())
        entry, is_new = Blobs(way.target).have(way.target_folder, replace(target, blob=""), digest, parts)
    if not is_new:
        way.told(source.nbytes)
    return entry


def copy_files(way: Way, files: Sequence[tuple[FileEntry, FileEntry]]) -> None:
    """Copy each file, as it is called in the source and in the copy. In memory: about 128 MiB, and what a put takes.

    A file whose bytes are not those of the record is never published: `CheckpointDamagedError`. The first failure ends
    it all, and so does an interrupt, within the time of a request; files that are done stay.
    """
    small = [pair for pair in files if pair[0].nbytes <= _WINDOW]
    large = [pair for pair in files if pair[0].nbytes > _WINDOW]
    stop = threading.Event()
    with ThreadPoolExecutor(_LARGE_AT_ONCE * _AHEAD, thread_name_prefix="shardckpt-copy-read") as readers:
        for group, at_once in ((small, _SMALL_AT_ONCE), (large, _LARGE_AT_ONCE)):
            with ThreadPoolExecutor(at_once, thread_name_prefix="shardckpt-copy") as writers:
                futures = [writers.submit(_copy, way, pair, readers, stop) for pair in group]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    stop.set()
                    writers.shutdown(wait=True, cancel_futures=True)
                    raise


def _copy(way: Way, pair: tuple[FileEntry, FileEntry], readers: ThreadPoolExecutor, stop: threading.Event) -> None:
    source, target = pair
    if stop.is_set():
        return
    way.target.put(f"{way.target_folder}/{target.name}", _windows(way, source, readers, stop))


def _windows(way: Way, file: FileEntry, readers: ThreadPoolExecutor, stop: threading.Event) -> Iterator[memoryview]:
    """The file's bytes; raises at the end, which undoes the put, if they are not those of the record."""
    key = file.key_in(way.source_folder)

    def read(start: int) -> memoryview:
        window = memoryview(bytearray(min(_WINDOW, file.nbytes - start)))
        way.source.read_into([Read(key, start, window)])
        return window

    starts, waiting, crc = iter(range(0, file.nbytes, _WINDOW)), deque[Future[memoryview]](), 0
    try:
        if file.nbytes <= _WINDOW:
            waiting.extend(_done(read(start)) for start in starts)
        else:
            waiting.extend(readers.submit(read, start) for start in islice(starts, _AHEAD))
        while waiting:
            window = waiting.popleft().result()
            if stop.is_set():
                raise InterruptedError("the copy was stopped")
            waiting.extend(readers.submit(read, start) for start in islice(starts, 1))
            crc = crc32(window, crc)
            yield window
            way.told(len(window))
    except (EOFError, FileNotFoundError) as error:
        raise CheckpointDamagedError(f"{key} in {way.source.url} is damaged: {error}") from error
    finally:
        for future in waiting:
            future.cancel()
    if crc != file.crc:
        raise CheckpointDamagedError(
            f"{key} in {way.source.url} is damaged: its bytes are not those that its record has the digest of"
        )


def _done(window: memoryview) -> Future[memoryview]:
    future = Future[memoryview]()
    future.set_result(window)
    return future
