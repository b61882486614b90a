"""Gloo groups of our own, which nobody else knows, and how ranks link up in them."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store as TorchStore

from shardckpt.errors import GangError
from shardckpt.gang.wire.mailbox import Mailbox, SilentError, Store
from shardckpt.gang.wire.messages import ranks_text
from shardckpt.gang.wire.vain import Ended

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Between two looks at whether a rank has said that it could not link up."""
_SAY_S = 2.0
"""How long it takes at most to say so."""
_MESSAGE_CHARS = 500


class LinkError(ConnectionError):
    """The link to rank 0 is closed, silent, or out of step; the star cannot be used any more."""


class _HeardError(LinkError):
    """Another rank has said that it could not link up."""


def once_more(link: Callable[[int], None]) -> None:
    """`link(0)`, and `link(1)` where nothing but links has failed; on all ranks, which get the same error of it.

    A gang is linked when a job begins to save, and after each failure: the next save would link it in any case.
    """
    try:
        link(0)
    except GangError as error:
        kinds = {failure.kind for failure in error.failures.values()}
        if error.absent or not kinds or kinds - {LinkError.__name__, _HeardError.__name__}:
            raise
        _log.warning("trying once more: %s", error)
        link(1)


class Linking:
    """This rank's part of making a group, which ends early on all ranks where it has failed on one.

    Gloo does not tell the others: rank 0, which waits inside it for the address or the connection of one that has
    failed, would do so until its deadline. So whoever fails leaves word in the store of the job, and those who wait
    look for it now and then, through a client of their own. Used by the gang's thread.
    """

    def __init__(self, make_store: Callable[[], Store], key: str, *, rank: int, name: str, ended: Ended) -> None:
        """`key` is the same on all ranks and never used before; `ended` tells whose processes are no more."""
        self._key, self._rank, self._ended = key, rank, ended
        self._looks = Mailbox(make_store, key, name=f"shardckpt-{name}-{rank}-links")
        self._looked = time.monotonic()

    def run(self, mailbox: Mailbox, make: Callable[[Store], _T], *, timeout_s: float) -> _T:
        """`make(store)`, by the thread of the mailbox. `LinkError` also where it is known to be in vain."""
        began = time.monotonic()
        try:
            return mailbox.run(make, timeout_s=timeout_s, ended=self._in_vain)
        except _HeardError:
            raise
        except LinkError as error:
            if time.monotonic() - began > 0.9 * timeout_s:
                raise  # it has waited for another, as they have
            with suppress(SilentError, RuntimeError):  # they wait until their deadline then
                mailbox.put(self._key, [self._rank, str(error)[:_MESSAGE_CHARS]], timeout_s=_SAY_S)
            raise
        finally:
            self._looks.close()

    def _in_vain(self) -> AbstractSet[int]:
        ended = self._ended()
        if not ended and time.monotonic() - self._looked > _LOOK_S:
            word: Any = None
            with suppress(SilentError, RuntimeError):
                word = self._looks.peek(self._key, timeout_s=0.0)
            self._looked = time.monotonic()
            if word is not None:
                raise _HeardError(f"{ranks_text([word[0]])} could not link up with others: {word[1]}")
        return ended


def open_group(store: TorchStore, *, rank: int, size: int, timeout: timedelta, interface: str = "") -> ProcessGroupGloo:
    """A gloo group that nobody else knows, under a prefix that was never used; called by all its ranks. `LinkError`."""
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._threads = 1
    try:
        options._devices = [_device(interface)]
        group: ProcessGroupGloo = gloo(store, rank, size, options)
    except RuntimeError as error:
        raise LinkError(str(error)) from None
    return group


def _device(interface: str) -> Any:
    """A new device, which must serve no other group."""
    gloo: Any = ProcessGroupGloo
    make = functools.partial(gloo.create_device, interface=interface) if interface else gloo.create_default_device
    try:
        return make(lazy_init=True)
    except TypeError:  # before torch 2.8: all ranks connect to all
        return make()
