"""Python's search for garbage, held off while many objects are made that are none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Python looks for no garbage meanwhile, in no thread: it would look through all objects again and again while a
    save is planned, or a load makes many of them. Any thread may be in it, several at a time too: the last to leave, or
    one before it, has it go on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
