"""Gloo groups of our own, which nobody else knows."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store


class LinkError(ConnectionError):
    """The link to rank 0 is closed, silent, or out of step; the star cannot be used any more."""


def open_group(store: Store, *, rank: int, size: int, timeout: timedelta, interface: str = "") -> ProcessGroupGloo:
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
