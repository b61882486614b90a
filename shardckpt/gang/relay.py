"""Bytes passed on between ranks of a gang, over a gloo group made for that alone. The gang itself moves none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.distributed_c10d import PrefixStore

from shardckpt.gang.wire.ending import close_at_the_end
from shardckpt.gang.wire.gloo import LinkError, open_group
from shardckpt.gang.wire.mailbox import Mailbox, Store


class Relay:
    """This rank's end. Its members call the same methods in the same order, each from one thread; errors are final."""

    def __init__(self, group: Any, members: Sequence[int], timeout: timedelta) -> None:
        self._group = group
        self._members = tuple(members)
        self._timeout = timeout
        close_at_the_end(self)

    def pass_on(self, content: memoryview, *, source: int) -> None:
        """Bytes of the rank `source` (of the gang) come into the writable `content` of the others, of the same length.

        `LinkError`, a `ConnectionError`, if a member is gone or does not come in time.
        """
        if not len(content):
            return
        try:
            work = self._group.broadcast(torch.frombuffer(content, dtype=torch.uint8), self._members.index(source))
            work.wait(self._timeout)
        except RuntimeError as error:
            raise LinkError(f"ranks {list(self._members)} could not pass on what they read: {error}") from None

    def close(self) -> None:
        """Cut the links. Never waits for the others."""
        self._group = None


@runtime_checkable
class Relaying(Protocol):
    """A gang whose ranks can pass on bytes."""

    def open_relay(self, ranks: Sequence[int], *, name: str, timeout: timedelta) -> Relay:
        """A relay between these ranks, called by all of them and by no others; `name` was never used before.

        In a scope, by the thread that uses the gang or while that waits for the caller's. `LinkError`.
        """
        ...


def open_by(mailbox: Mailbox, ranks: Sequence[int], own: int, *, name: str, options: dict[str, Any]) -> Relay:
    """The relay whose ranks find each other through the store of a gang."""
    timeout: timedelta = options["timeout"]
    prefix, place = mailbox.key("relay", name), list(ranks).index(own)
    mailbox.own(f"{prefix}/0/{place}")  # where gloo puts this rank's address

    def connect(store: Store) -> Any:
        below: Any = PrefixStore(prefix, store)  # type: ignore[arg-type]
        return open_group(below, rank=place, size=len(ranks), **options)

    return Relay(mailbox.run(connect, timeout_s=timeout.total_seconds()), ranks, timeout)
