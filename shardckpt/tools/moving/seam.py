"""The seam between what reads checkpoints of a form and what writes them in another. No process group, one process.

A source shows a checkpoint, of whatever program and however it is sharded, as whole tensors under flat names, and the
nesting in which they stood. A sink takes all or some of that. Between the two go byte ranges of row-major tensors, so
that neither ever holds a tensor whole that is larger than its budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shardckpt.format.index import ITEMSIZE


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A whole tensor."""

    dtype: str
    """As torch calls it, "bfloat16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorName:
    """Stands in a tree for the tensor of this flat name."""

    name: str


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes `start` to `start + len(into)` of a tensor as it lies row by row, and where they are to go."""

    name: str
    start: int
    into: memoryview
    """Writable bytes."""


class TensorSource(Protocol):
    """A checkpoint to be read. Any thread may call `read`, several at once."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Every tensor that has bytes of its own, by flat name ("model.layers.0.weight"), in the checkpoint's order."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """Names that stand for the same bytes as another, which is in `tensors`."""
        ...

    @property
    def tree(self) -> Any:
        """The state as it was nested, with a `TensorName` for each tensor, tied ones too; all else as it is."""
        ...

    def read(self, windows: Sequence[Window]) -> None:
        """Fill these windows; near ones are read together.

        Bytes are checked as far as the form has sums for them: `CheckpointDamagedError`. What cannot be read now is
        `CheckpointLoadError`.
        """
        ...

    def close(self) -> None:
        """Give back what it holds open."""
        ...


class SourceAround:
    """Shows what another source has; those derived from it do something when it is read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._source.tensors

    @property
    def ties(self) -> Mapping[str, str]:
        return self._source.ties

    @property
    def tree(self) -> Any:
        return self._source.tree

    def close(self) -> None:
        self._source.close()


class TensorSink(Protocol):
    """A form in which checkpoints are written."""

    def write(self, source: TensorSource, *, budget_nbytes: int) -> None:
        """All of the source, with at most about so many bytes in memory at once; whole, or not there at all."""
        ...
