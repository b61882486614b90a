"""Many small requests to a storage at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    with ThreadPoolExecutor(min(AT_ONCE, len(items)), thread_name_prefix="shardckpt-request") as pool:
        return list(pool.map(call, items))
