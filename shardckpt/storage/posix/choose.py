"""Which way is the fastest to this root? The first large file that goes there finds out, each stretch another way.

(2026-11: DESIGN had a probe of the root before the first save. A file of the save itself is the better probe: it costs
no extra byte, it is written while all ranks write, as every later one will be, and it leaves nothing to remove.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from shardckpt.storage.base import Buffer
from shardckpt.storage.posix.explain import explained
from shardckpt.storage.posix.syscalls import allocate
from shardckpt.storage.posix.write import METHODS, MethodName, WriteMethod, write_parts
from shardckpt.storage.transfer.ranges import as_bytes

STRETCH = 64 << 20
"""Bytes of one trial: 25 ms of a fast disk, so that one sync more does not show."""
_ORDER: tuple[MethodName, ...] = ("direct", "dontcache", "buffered", "buffered", "dontcache", "direct")
"""There and back: what comes and goes with time meets all alike."""
_GAIN = 1.15
"""How much faster another way must be than the default, which leaves processor and page cache to the training."""


class Chooser:
    """The way to write below one root; of one `LocalStorage`. Any thread may call; two that try at once both decide."""

    def __init__(
        self,
        given: WriteMethod | None = None,
        *,
        stretch: int = STRETCH,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`given` is not to be questioned. `stretch`: bytes of a trial; `clock` gives seconds."""
        self._chosen = given
        self._stretch = stretch
        self._clock = clock

    @property
    def method(self) -> WriteMethod:
        """What is used now: the default until the ways have been tried."""
        return self._chosen or METHODS["direct"]

    def write(
        self, file: int, parts: Iterable[Buffer], *, reopen: Callable[[int], int], what: str, offset: int = 0
    ) -> int:
        """As `write_parts`, by the best way that is known; a file that is large enough tries them all."""
        if self._chosen is None and isinstance(parts, Sequence):
            nbytes = sum(memoryview(part).nbytes for part in parts)
            if nbytes >= 2 * len(_ORDER) * self._stretch:
                with explained(what):
                    allocate(file, nbytes, offset=offset)
                return self._try(file, parts, nbytes, offset, lambda *given, method, at: write_parts(
                    *given, method=method, reopen=reopen, what=what, offset=at))  # fmt: skip
        return write_parts(file, parts, method=self.method, reopen=reopen, what=what, offset=offset)

    def _try(self, file: int, parts: Sequence[Buffer], nbytes: int, offset: int, write: Callable[..., int]) -> int:
        seconds = dict.fromkeys(METHODS, 0.0)
        for number, name in enumerate(_ORDER):
            start = number * self._stretch
            stretch = list(cut(parts, start, start + self._stretch))
            began = self._clock()
            write(file, stretch, method=METHODS[name], at=offset + start)
            seconds[name] += self._clock() - began
        tried = len(_ORDER) * self._stretch
        fastest = min(METHODS, key=lambda name: seconds[name])
        self._chosen = METHODS[fastest if seconds["direct"] > _GAIN * seconds[fastest] else "direct"]
        return tried + write(file, list(cut(parts, tried, nbytes)), method=self._chosen, at=offset + tried)


def cut(parts: Sequence[Buffer], start: int, end: int) -> Iterator[memoryview]:
    """The bytes from `start` to `end` of the parts, one after the other, where they lie."""
    at = 0
    for part in parts:
        view = as_bytes(part)
        if found := view[max(start - at, 0) : max(end - at, 0)]:
            yield found
        at += len(view)
