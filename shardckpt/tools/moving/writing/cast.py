"""A source whose floating-point tensors are given in another dtype, window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from shardckpt.format.index import ITEMSIZE
from shardckpt.tools.exporting.summing import known_crc
from shardckpt.tools.moving.seam import TensorFacts, TensorSource, Window
from shardckpt.tools.moving.writing.elements import Stretch


def floating(dtype: str) -> bool:
    """Whether it is a dtype of real numbers that torch calculates with."""
    return dtype in ITEMSIZE and dtype.startswith(("float", "bfloat")) and not dtype.startswith("float4")


def check_floating(dtype: str) -> None:
    """`ValueError` if it is none."""
    if not floating(dtype):
        raise ValueError(f"{dtype!r} is no floating-point dtype: give 'bfloat16', 'float16', 'float32', ...")


class CastSource:
    """As `source`, with floating-point tensors as `dtype`: rounded as `tensor.to(dtype)` does, so that what is too
    large for it becomes what torch makes of it. All other tensors stay as they are."""

    def __init__(self, source: TensorSource, dtype: str) -> None:
        """`ValueError` if that is no floating-point dtype of torch."""
        check_floating(dtype)
        self._source, self._dtype = source, dtype

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {
            name: TensorFacts(self._dtype, facts.shape) if floating(facts.dtype) else facts
            for name, facts in self._source.tensors.items()
        }

    @property
    def ties(self) -> Mapping[str, str]:
        return self._source.ties

    @property
    def tree(self) -> Any:
        return self._source.tree

    def crc(self, name: str) -> int | None:
        return None if floating(self._source.tensors[name].dtype) else known_crc(self._source, name)

    def read(self, windows: Sequence[Window]) -> None:
        facts, own = self.tensors, self._source.tensors
        asked: list[Window] = []
        made: list[tuple[Stretch, torch.Tensor]] = []
        for window in windows:
            before = own[window.name].dtype
            if before == facts[window.name].dtype:
                asked.append(window)
                continue
            stretch = Stretch.of(window, facts[window.name])
            elements, view, start = stretch.space(before)
            asked.append(Window(window.name, start, view))
            made.append((stretch, elements))
        self._source.read(asked)
        for stretch, elements in made:
            stretch.fill(elements.to(getattr(torch, self._dtype)))

    def close(self) -> None:
        self._source.close()
