"""Work shared by a few threads that live no longer than the call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, count, islice
from queue import Queue
from typing import Generic, TypeVar

T = TypeVar("T")


def for_each(items: Iterable[T], work: Callable[[T], None], *, threads: int) -> None:
    """Call `work` on every item; the first failure in item order ends it and is raised, and no thread is left behind.

    Items are pulled by the caller's thread alone, in order, at most `2 * threads` ahead of the work: an iterator that
    fills its buffers as it goes needs no lock and no unbounded memory.

    Plain threads, made per call: starting one costs 50 us against milliseconds of I/O. A `ThreadPoolExecutor` takes no
    work any more once the main thread has ended, which is when the save thread may still be writing the last
    checkpoint; and a pool that is kept breaks after a fork and must be closed.
    """
    remaining = iter(items)
    first = list(islice(remaining, 2))
    if len(first) < 2 or threads < 2:
        for item in chain(first, remaining):
            work(item)
        return
    crew = _Crew(work, threads)
    try:
        for item in chain(first, remaining):
            if crew.failed:
                break
            crew.give(item)
    except BaseException:
        crew.drop_waiting()
        raise
    finally:
        crew.join()  # the memory that the work reads and fills is the caller's
    crew.raise_first()


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bundles(items: Iterable[T], nbytes_of: Callable[[T], int], *, most: int) -> Iterator[list[T]]:
    """Neighbours of together at most so many bytes, or one that is larger: to hand a thread its work costs 0.1 ms, in
    which it would have copied a megabyte."""
    bundle: list[T] = []
    room = most
    for item in items:
        nbytes = nbytes_of(item)
        if bundle and nbytes > room:
            yield bundle
            bundle, room = [], most
        bundle.append(item)
        room -= nbytes
    if bundle:
        yield bundle


class _Crew(Generic[T]):
    """Threads that do the work in the order in which it is given, until one fails."""

    def __init__(self, work: Callable[[T], None], threads: int) -> None:
        self._work = work
        self._waiting: Queue[tuple[int, T] | None] = Queue(maxsize=threads)
        self._numbers = count()
        self._failures: dict[int, BaseException] = {}
        self.failed = False
        self._threads: list[threading.Thread] = []
        # Python 3.12 makes no new thread while it shuts down, and a process may be allowed no more of them.
        with suppress(RuntimeError):
            for number in range(threads):
                thread = threading.Thread(target=self._run, name=f"shardckpt-io-{number}")
                thread.start()
                self._threads.append(thread)

    def give(self, item: T) -> None:
        """Waits while as many items wait as there are threads. Without any thread, does the work itself."""
        if self._threads:
            self._waiting.put((next(self._numbers), item))
        else:
            self._work(item)

    def drop_waiting(self) -> None:
        self.failed = True

    def join(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def raise_first(self) -> None:
        if self._failures:
            raise self._failures[min(self._failures)]

    def _run(self) -> None:
        while (given := self._waiting.get()) is not None:
            number, item = given
            if not self.failed:
                try:
                    self._work(item)
                except BaseException as error:
                    self._failures[number] = error
                    self.failed = True
