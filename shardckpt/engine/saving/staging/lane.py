"""The way of one save's tensors from devices to the host: after what, and until when.

Two points of training's stream matter. Where `save` was called, the state is what is to be saved: copies on the side
stream begin after that mark (`begin`). Where training changes the state next, the copies must be over: its stream is
made to wait for their marks (`hold`), and training's thread is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from shardckpt.engine.saving.devices.seam import Devices, Mark, Place


class Lane:
    """Of one save. `begin` and `hold` are called by the thread that training's kernels come from."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._since: dict[Place, Mark] = {}
        self._ends: tuple[tuple[Place, Mark], ...] = ()

    @property
    def places(self) -> Sequence[Place]:
        """The devices that tensors of this save lie on; none if all are the host's, or `settle` was called."""
        return tuple(self._since)

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        return self._devices.place_of(tensor)

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        """This is the moment whose state is saved."""
        if self._devices.are_used:
            places = dict.fromkeys(self._devices.place_of(tensor) for tensor in tensors)
            self._since = {place: self._devices.mark(place) for place in places if place is not None}

    def settle(self) -> None:
        """Hold this thread until the devices have come to the moment of `begin`: then any thread, on any stream, reads
        what is to be saved."""
        for mark in self._since.values():
            mark.wait()

    def copy(self, place: Place, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Mark:
        """Queue copies of these (target, source) pairs."""
        targets, sources = zip(*pairs, strict=True)
        end = self._devices.copy(place, self._since[place], targets, sources)
        self._ends = (*self._ends, (place, end))
        return end

    def beside(self, place: Place) -> AbstractContextManager[None]:
        """For reads that this thread waits for."""
        return self._devices.beside(place, self._since[place])

    def hold(self) -> None:
        """What training queues from now on begins after the copies that were queued so far."""
        for place, mark in self._ends:
            self._devices.hold(place, mark)

    def finish(self) -> None:
        """Hold this thread until the copies that were queued so far are over."""
        ends = self._ends
        for _, mark in ends:
            mark.wait()
        self._ends = self._ends[len(ends) :]
