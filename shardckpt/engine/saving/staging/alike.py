"""Tensors that another rank writes in its own file, and that this one is taken to hold alike: they are summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from shardckpt.engine.saving.devices.seam import Devices
from shardckpt.engine.saving.image import Image
from shardckpt.engine.saving.staging.file import Wanted, crc_of, digest_of
from shardckpt.format.archive import LINE
from shardckpt.format.checksum import crc32


class Alike:
    """Summed up where they lie; those on devices are copied to memory of their own first where that is page-locked, so
    that training need not wait for a sum. One per stager, used for one save at a time."""

    def __init__(self) -> None:
        self.image = Image()
        self.digests: dict[str, dict[str, str]] = {}
        """By group and name. After `seal`."""
        self._tensors: list[tuple[str, str, torch.Tensor]] = []
        self._starts: list[int] = []
        self._queued: set[int] = set()

    def prepare(self, alike: Mapping[str, Sequence[tuple[str, torch.Tensor]]], devices: Devices) -> None:
        """Begin a save. Touches no tensor."""
        self.digests = {group: {} for group in alike}
        self._tensors = [(group, name, tensor) for group, tensors in alike.items() for name, tensor in tensors]
        self._queued, self._starts, end = set(), [], 0
        if not devices.are_used:
            return
        for _, _, tensor in self._tensors:
            self._starts.append(end)
            if devices.place_of(tensor) is not None:
                end += -(-tensor.numel() * tensor.element_size() // LINE) * LINE
        if end:
            self.image.reserve(end)

    def jobs(self, wanted: Wanted) -> Iterable[Callable[[], None]]:
        """Sums of the wanted tensors."""
        for number, (_, _, tensor) in enumerate(self._tensors):
            if wanted(tensor):
                yield self._sum_job(number)

    def transfers(self, wanted: Wanted) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """What is to be copied instead: (target, source)."""
        for number, (_, _, tensor) in enumerate(self._tensors):
            if wanted(tensor):
                self._queued.add(number)
                if tensor.numel():
                    yield self.image.tensor(self._starts[number], tensor.dtype, tuple(tensor.shape)), tensor

    def nbytes_of(self, wanted: Wanted) -> int:
        """Bytes of the tensors for which it holds."""
        return sum(tensor.numel() * tensor.element_size() for _, _, tensor in self._tensors if wanted(tensor))

    def seal(self) -> dict[str, dict[str, str]]:
        """Sum up what was copied. After all copies."""
        for number in self._queued:
            group, name, tensor = self._tensors[number]
            start, nbytes = self._starts[number], tensor.numel() * tensor.element_size()
            crc = crc32(self.image.view[start : start + nbytes]) if nbytes else 0
            self.digests[group][name] = digest_of(tensor.dtype, tuple(tensor.shape), crc)
        self._queued = set()
        return self.digests

    def let_go(self) -> None:
        self._tensors = []

    def _sum_job(self, number: int) -> Callable[[], None]:
        group, name, tensor = self._tensors[number]

        def sum_up() -> None:
            self.digests[group][name] = digest_of(tensor.dtype, tuple(tensor.shape), crc_of(tensor))

        return sum_up
