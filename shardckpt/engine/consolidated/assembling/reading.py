"""Bring stretches of whole tensors together: by one vectored read of the ranks' files, and from a rank's own memory."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardckpt.engine.consolidated.assembling.whole import EVERYWHERE, Source, WholeTensor
from shardckpt.engine.consolidated.blocks import Block, Shape, common, is_one_run, position, stretch
from shardckpt.engine.consolidated.fragments import word_type, words
from shardckpt.format.index import ITEMSIZE
from shardckpt.storage.base import Read, Storage

_LINE = 64
"""Bytes at multiples of which memory for a tensor begins."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the bytes of the tensors come from."""

    storage: Storage
    files: Callable[[int], str]
    """The key of a rank's file."""
    own: Mapping[tuple[str, Shape], torch.Tensor]
    """What this rank holds itself, by name and offsets: live memory."""
    rank: int = 0

    def has(self, name: str, source: Source) -> torch.Tensor | None:
        """The block of a tensor if this rank holds it."""
        return self.own.get((name, source.block.offsets)) if source.rank in (self.rank, EVERYWHERE) else None


class Nearby:
    """The sources of a tensor, found by what they have."""

    def __init__(self, tensor: WholeTensor) -> None:
        self.tensor = tensor
        has_rows = bool(tensor.shape)
        self._starts = [source.block.offsets[0] for source in tensor.sources] if has_rows else []
        self._longest = max((source.block.lengths[0] for source in tensor.sources), default=0) if has_rows else 0

    def sources(self, block: Block) -> Sequence[Source]:
        """All that may have some of this block, and not many others."""
        if not self._starts:
            return self.tensor.sources
        first, end = block.offsets[0], block.offsets[0] + block.lengths[0]
        low = bisect.bisect_left(self._starts, first - self._longest + 1)
        return self.tensor.sources[low : bisect.bisect_left(self._starts, end)]


@dataclass(frozen=True, slots=True)
class Place:
    """Memory to be filled from its byte `at` on: the same bytes as a tensor and as a view."""

    memory: torch.Tensor
    view: memoryview
    at: int


class Reading:
    """What is read at once. `add` says what is wanted; after `finish` it is there."""

    def __init__(self, parts: Parts, scratch: torch.Tensor) -> None:
        """`scratch`: memory for what is not read straight to its place; used until `finish`."""
        self._parts = parts
        self._scratch = scratch
        self._used = 0
        self._reads: list[Read] = []
        self._moves: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, place: Place, nearby: Nearby, start: int, stop: int) -> None:
        """The bytes from `start` to `stop` of a tensor, in row-major order, are to go to the place."""
        tensor, itemsize = nearby.tensor, ITEMSIZE[nearby.tensor.dtype]
        flat = place.memory[place.at : place.at + stop - start].view(word_type(itemsize))
        done = 0
        for block in stretch(tensor.shape, start // itemsize, stop // itemsize):
            target = flat[done : done + block.numel].view(block.lengths)
            at = Place(place.memory, place.view, place.at + done * itemsize)
            for source in nearby.sources(block):
                shared = common(block, source.block)
                if shared is not None:
                    self._bring(tensor.name, source, shared, (block, target, at))
            done += block.numel

    def finish(self) -> None:
        """Read everything."""
        self._parts.storage.read_into(self._reads)
        for place, found in self._moves:
            place.copy_(found)
        self._reads, self._moves, self._used = [], [], 0

    def _bring(self, name: str, source: Source, shared: Block, into: tuple[Block, torch.Tensor, Place]) -> None:
        """What a source has of a block: at once if it is here, else by a read, since it is one run of a file.

        (A block is a stretch: a place in the first dimensions, a range of one, all of the others. What a source has of
        that is the same in terms of its own dimensions.)
        """
        block, target, place = into
        there, here = shared.inside(block), shared.inside(source.block)
        own = self._parts.has(name, source)
        if own is not None:
            target[there.slices].copy_(words(own[here.slices]))
            return
        itemsize = target.element_size()
        nbytes = shared.numel * itemsize
        if is_one_run(block.lengths, there.lengths):
            begin = place.at + position(block.lengths, there.offsets) * itemsize
            view = place.view[begin : begin + nbytes]
        else:
            found = self._room(nbytes)
            view = memoryview(found.numpy().data)
            self._moves.append((target[there.slices], found.view(target.dtype).view(shared.lengths)))
        offset = source.at + position(source.block.lengths, here.offsets) * itemsize
        self._reads.append(Read(self._parts.files(source.rank), offset, view))

    def _room(self, nbytes: int) -> torch.Tensor:
        start = -(-self._used // _LINE) * _LINE
        if start + nbytes > len(self._scratch):
            return torch.empty(nbytes, dtype=torch.uint8)
        self._used = start + nbytes
        return self._scratch[start : start + nbytes]
