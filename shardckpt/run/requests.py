"""Many small requests to a storage at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 16
"""Enough to hide the round trips of an object store; few enough not to be throttled by one."""


def each(call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The result of `call` for every item, in order, up to `AT_ONCE` of them at a time.

    The threads are gone when it returns. The first error, in the order of the items, is raised; what has not begun
    by then is not begun.
    """
    if len(items) < 2:
        return [call(item) for item in items]
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}
    numbers, over = count(), False

    def work() -> None:
        """Takes one after the other: a future for each of 10,000 requests takes longer than the requests to a disk."""
        nonlocal over
        while not over and (number := next(numbers)) < len(items):
            try:
                results[number] = call(items[number])
            except BaseException as error:
                failures[number], over = error, True

    threads = min(AT_ONCE, len(items))
    with ThreadPoolExecutor(threads, thread_name_prefix="shardckpt-request") as pool:
        try:
            wait([pool.submit(work) for _ in range(threads)])
        finally:
            over = True  # also where this wait was interrupted
    if failures:  # those before the first of them have all begun, and have ended well
        raise failures[min(failures)]
    return [results[number] for number in range(len(items))]
