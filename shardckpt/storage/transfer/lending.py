"""The seam of a place that can lend its bytes: whoever only looks at them needs no memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from shardckpt.storage.base import Storage


class Lent(Protocol):
    """One object, to be looked at where it lies. Any thread may look; nobody after `close`.

    Bytes must be brought before they are looked at, and looked at soon. What cannot be had is an `OSError` of `bring`
    or, if the object ends too early, an `EOFError`; a look at what was not brought may end the process (SIGBUS).
    """

    @property
    def view(self) -> memoryview:
        """All of it, read-only."""
        ...

    @property
    def address(self) -> int:
        """Of its first byte."""
        ...

    def state(self) -> tuple[int, ...]:
        """Stays the same as long as nobody writes to the object."""
        ...

    def is_here(self, start: int, nbytes: int) -> bool:
        """Whether these bytes can be brought without being waited for, as far as some samples tell: now, no promise."""
        ...

    def bring(self, start: int, nbytes: int) -> None:
        """Returns when these bytes can be looked at. Lets other threads run meanwhile."""
        ...

    def take(self, start: int, into: Sequence[memoryview], *, wait: bool) -> bool:
        """Copy the bytes from `start` on into these buffers, one after the other; at most 1024 of them.

        Without `wait`, False if any of them would have to be waited for; the buffers then hold anything.
        """
        ...

    def forget(self, start: int, nbytes: int) -> None:
        """These bytes will not be looked at again soon: they are not to count as memory of this process."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class LendingStorage(Storage, Protocol):
    """A place that lends its objects: a file system of this machine."""

    def lend(self, key: str) -> Lent:
        """The object, to be closed by the caller. `FileNotFoundError`; `OSError(ENODEV)` if this place cannot lend."""
        ...
