"""What the threads of a load share, cut into pieces: large enough to cost nothing, small enough to share a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from shardckpt.gang.gangs import ranks_of_machine
from shardckpt.storage.transfer.several import bundles, processors

PIECE = 16 << 20
"""Bytes that one thread looks at in one go; those of a mapped file count as memory meanwhile. With 4, 8, 16, 32 and 64
MiB a load of 1 GB in 300 tensors took 313, 276, 250, 245, 235 ms warm, 860, 712, 778, 747, 746 cold (files,
medians of 11 and 7)."""


def threads() -> int:
    """How many threads of a rank share the work of a load: two, or one where ranks have not even a processor each.

    2026-11-28, 2 processors, 3 GB in memory that 2 ranks had saved, the first load of a process, one thread against
    two, medians of 6 turns: on 4 ranks 0.59 s (0.57-0.83) against 0.66 (0.59-0.81), on 2 ranks 0.51 (0.47-0.73) against
    0.48 (0.46-0.64).
    """
    return 2 if ranks_of_machine() <= processors() else 1


class Part(Protocol):
    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Part)


@dataclass(slots=True)
class Unit(Generic[P]):
    """What one thread does in one go."""

    parts: list[P] = field(default_factory=list)
    nbytes: int = 0


def units(parts: Iterable[P]) -> Iterator[Unit[P]]:
    """Neighbours together, up to `PIECE`."""
    for bundle in bundles(parts, lambda part: part.nbytes, most=PIECE):
        yield Unit(bundle, sum(part.nbytes for part in bundle))


def cut(nbytes: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of so many bytes; one of none if there are none."""
    return ((start, min(PIECE, nbytes - start)) for start in range(0, max(nbytes, 1), PIECE))


def is_cut(source: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether a copy is one that threads share: large, and of elements in a row."""
    return source.nbytes > PIECE and source.is_contiguous() and place.is_contiguous()


def copies(source: torch.Tensor, place: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A copy that `is_cut`, piece by piece: the first byte of the source, and elements of both."""
    flat_source, flat_place, size = source.view(-1), place.view(-1), source.dtype.itemsize
    step = PIECE // size
    for first in range(0, flat_source.numel(), step):
        yield first * size, flat_source[first : first + step], flat_place[first : first + step]


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], *, inference: bool) -> None:
    """Copy each source to its place, in a thread that has been told whether it is in inference mode."""
    sources, places = zip(*pairs, strict=True)
    with torch.inference_mode(inference), torch.no_grad():
        torch._foreach_copy_(list(places), list(sources))
