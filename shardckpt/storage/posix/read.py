"""Reading ranges of files straight into their destinations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby, islice

from shardckpt.storage.base import Read
from shardckpt.storage.posix.explain import explained
from shardckpt.storage.posix.folders import let_go
from shardckpt.storage.posix.uncached import read_large
from shardckpt.storage.posix.write import MOST_BUFFERS, skipped
from shardckpt.storage.transfer.ranges import Run, merge
from shardckpt.storage.transfer.several import for_each

_RUN_NBYTES = 8 << 20
_FILES_AT_ONCE = 64


def read_runs(reads: Sequence[Read], *, opened: Callable[[str], int], url: str, threads: int) -> None:
    """Fill every destination; `opened(key)` gives a new descriptor of a regular file, which is closed here.

    `EOFError` if a file ends too early. A few files are open at a time, however many the reads touch.
    """
    runs = merge(reads, run_nbytes=_RUN_NBYTES, run_buffers=MOST_BUFFERS)
    files = [(key, list(group)) for key, group in groupby(runs, key=lambda run: run.key)]
    remaining = iter(files)
    while batch := list(islice(remaining, _FILES_AT_ONCE)):
        with ExitStack() as stack:
            descriptors: dict[str, int] = {}
            for key, _ in batch:
                descriptors[key] = opened(key)
                stack.callback(let_go, descriptors[key])

            def fill(run: Run, descriptors: dict[str, int] = descriptors) -> None:
                _fill(descriptors[run.key], run, url)

            for_each((run for _, group in batch for run in group), fill, threads=threads)


def _fill(file: int, run: Run, url: str) -> None:
    offset, buffers = run.offset, list(run.into)
    if len(buffers) == 1 and (done := read_large(file, buffers[0], offset)):
        offset, buffers = offset + done, skipped(buffers, done)
    while buffers:
        with explained(f"cannot read {run.key!r} in {url}"):
            done = os.preadv(file, buffers, offset)
        if done == 0:
            raise run.ended_early(url, have=offset - run.offset)
        offset, buffers = offset + done, skipped(buffers, done)
