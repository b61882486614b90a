"""What staging asks of a kind of device. A device does what threads queue for it, stream by stream, and later.

A `place` is a device, an opaque value. Each thread has a current stream per place, which training's kernels go to, and
each place has one side stream of ours, which copies go to.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import torch

Place: TypeAlias = Hashable


class Mark(Protocol):
    """A point in a stream: reached when everything that was queued there before is done."""

    def wait(self) -> None:
        """Hold this thread until it is reached; other Python threads go on."""


class Devices(Protocol):
    """Any thread may call; several at a time, too."""

    @property
    def are_used(self) -> bool:
        """False if no tensor of this process can lie on one."""

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """Where it lies, if that is on one of these devices."""

    def mark(self, place: Place) -> Mark:
        """What is queued so far on this thread's current stream."""

    def copy(self, place: Place, after: Mark, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Mark:
        """Queue copies into page-locked host memory on the side stream, after that mark. Both sides must live, and the
        sources stay as they are, until the mark that it gives is reached. Does not wait for the device."""

    def beside(self, place: Place, after: Mark) -> AbstractContextManager[None]:
        """What this thread reads inside is as it was at that mark, or later, and the thread waits for it."""

    def hold(self, place: Place, mark: Mark) -> None:
        """What is queued from now on on this thread's current stream begins after that mark. The thread goes on."""

    def lock(self, memory: mmap.mmap, place: Place) -> Callable[[], None]:
        """Page-lock memory that nothing is copied to meanwhile; gives what undoes it. `OSError` says why it cannot be.
        Takes a second per few gigabytes, and may make the device pause: not for training's thread."""
