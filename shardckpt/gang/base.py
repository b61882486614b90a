"""The seam of the gang: what the engine asks of the processes that act together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from shardckpt.errors import GangError

if TYPE_CHECKING:
    from shardckpt.gang.wire.mailbox import Line

Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | dict[str, Json]"
"""What a message may hold. Messages are JSON and never pickles: a peer cannot make us run code."""


Fold: TypeAlias = "Callable[[Sequence[Any]], Json]"
"""Makes one value of several, given in rank order, some of which may be made so already. Pure; on any rank."""


class GatherError(GangError):
    """A gather in which some ranks did not come; `values` holds what the others gave, by rank (of folded ones by the
    first rank)."""

    def __init__(self, message: str, *, absent: Sequence[int] = (), values: Mapping[int, Json] | None = None) -> None:
        super().__init__(message, absent=absent)
        self.values = dict(values or {})


class Gang(Protocol):
    """Some processes (or, in tests, threads) that act together; exchanges small JSON values, never tensors.

    Every operation is called by all ranks of the gang, in the same order, from one thread per rank at
    a time, and ends on every rank within its timeout: with a result, or with a `GangError` that names
    the ranks that did not come (`absent`). Rank numbers are those of this gang: 0 .. size - 1.

    The ranks other than 0 wait a little longer than `timeout` (a tenth of it, at least 1 s and at most
    10 s), so that they hear from rank 0 who was missing instead of giving up just before. After a
    `GangError` one more `broadcast` may tell the others of it; then a new scope must be entered.
    """

    @property
    def name(self) -> str:
        """For messages: "root", "dp", ..."""
        ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def enter(self, scope: str, *, timeout: timedelta, skipped: Sequence[str] = ()) -> None:
        """Start a new conversation, e.g. "save/1000/0": all ranks that take part give the same name.

        Whatever an earlier conversation left behind (messages of a rank that came late, a broken
        connection) cannot reach the new one. All ranks meet here, so it is also a barrier.

        `skipped`: scopes that this rank was to enter, and has given up before it did. Who still waits for it there is
        told to leave, as with those that it has entered.
        """
        ...

    def gather(self, value: Json, *, timeout: timedelta, fold: Fold | None = None) -> list[Json] | None:
        """Give `value`; rank 0 gets every rank's value in rank order, the others get None.

        With `fold`, which all ranks give, rank 0 may get for several ranks that follow each other what `fold` made of
        their values: where there are many ranks they are put together on the way, and that need not be long.

        On rank 0 it raises `GatherError` when values are missing at the timeout (or as soon as it is known
        that they will not come). The other ranks need not learn of that here; they do in the `broadcast` that
        follows.
        """
        ...

    def broadcast(self, value: Json, *, timeout: timedelta) -> Json:
        """Every rank gets the value that rank 0 gave; what the others pass is ignored."""
        ...

    def subgang(self, ranks: Sequence[int], name: str) -> Gang | None:
        """A gang of these ranks of this one, in this order; None where this rank is not among them.

        Called by all ranks of this gang (also by those outside), with the same arguments or, for
        disjoint groups made at once, with each rank's own group.
        """
        ...

    def line(self) -> Line | None:
        """Keys of this gang's own, past its conversations, for other threads; None for a gang of one."""
        ...

    def close(self) -> None:
        """Give back connections and threads. Never blocks on peers; may be called twice."""
        ...
