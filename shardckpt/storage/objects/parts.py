"""An object cut into the parts of a multipart upload. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from shardckpt.storage.base import Buffer
from shardckpt.storage.transfer.ranges import as_bytes

MOST = 10_000
"""Parts of an upload; the first has number 1."""
LEAST = 5 << 20
"""Bytes of a part that is not the last one."""
_AS_LARGE = 2000
"""Parts, of an object whose size is not known, before they grow to twice their size; five sizes reach 496 GB."""


def nbytes_of(parts: Iterable[Buffer]) -> int | None:
    """Of all of them together; None where that is known only once they have come."""
    return sum(memoryview(part).nbytes for part in parts) if isinstance(parts, Sequence) else None


def sizes(total: int | None, *, part_nbytes: int, room: int) -> Callable[[int], int]:
    """How large the n-th part (from 0) is to be: about `part_nbytes`, so that `room` numbers are enough for all.

    Of a known total all parts are equally large, the last one by a rest larger, and none is smaller than `LEAST`.
    """
    if total is None:
        return lambda number: part_nbytes << min(number // _AS_LARGE, 4)
    count = max(1, min(-(-total // part_nbytes), total // LEAST, room))
    return lambda number: total // count if number < count - 1 else max(total, 1)


def cut(parts: Iterable[Buffer], size_of: Callable[[int], int]) -> Iterator[memoryview]:
    """The bytes one after the other in pieces of these sizes, the last one shorter; one piece if there are none.

    A piece that lies in one buffer is a view of it; only what spans several is copied together.
    """
    number, gathered, missing = 0, list[memoryview](), size_of(0)
    for part in parts:
        view = as_bytes(part)
        while len(view):
            taken = view[:missing]
            gathered.append(taken)
            view, missing = view[len(taken) :], missing - len(taken)
            if not missing:
                yield _joined(gathered)
                number, gathered = number + 1, []
                missing = size_of(number)
    if gathered or not number:
        yield _joined(gathered)


def _joined(views: list[memoryview]) -> memoryview:
    return views[0] if len(views) == 1 else memoryview(b"".join(views))
