"""Bytes of windows as elements of tensors, for sources that change what they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardckpt.format.index import ITEMSIZE
from shardckpt.tools.moving.seam import TensorFacts, Window


@dataclass(frozen=True, slots=True)
class Stretch:
    """The elements `first` to `last` of a tensor, of which a window wants some bytes: most often all."""

    window: Window
    facts: TensorFacts
    first: int
    last: int

    @classmethod
    def of(cls, window: Window, facts: TensorFacts) -> Stretch:
        size = ITEMSIZE[facts.dtype]
        return cls(window, facts, window.start // size, -(-(window.start + len(window.into)) // size))

    def space(self, dtype: str) -> tuple[torch.Tensor, memoryview, int]:
        """Memory for these elements in a dtype: as a tensor, as bytes, and at which byte of the tensor it begins."""
        tensor = torch.empty(self.last - self.first, dtype=getattr(torch, dtype))
        return tensor, _bytes_of(tensor), self.first * ITEMSIZE[dtype]

    def fill(self, elements: torch.Tensor) -> None:
        """Give the window its bytes of these elements, which have its dtype."""
        skipped = self.window.start - self.first * ITEMSIZE[self.facts.dtype]
        self.window.into[:] = _bytes_of(elements)[skipped : skipped + len(self.window.into)]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data)
