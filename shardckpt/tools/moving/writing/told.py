"""With what means a checkpoint is moved, and a source that tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeAlias

from shardckpt.gang.gangs import Gangs
from shardckpt.tools.exporting.summing import known_crc
from shardckpt.tools.moving.seam import SourceAround, TensorSource, Window

Told: TypeAlias = Callable[[int, int, int], None]
"""Hears, on any thread, of the step's number, the bytes that have just been read, and those that will be."""


def _unheard(step: int, nbytes: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Means:
    """What `export` and `average` may use, and who hears of their progress."""

    budget_nbytes: int = 256 << 20
    """Bytes of tensors in memory at once, more or less; beside it, up to 64 MiB for each source."""
    storage_options: Mapping[str, object] | None = field(default=None, repr=False)
    """For fsspec, at all places that are no local paths; never logged."""
    told: Told = _unheard
    """Called as (step, bytes that have just been read, bytes that will be read in all); of what this rank reads."""
    gangs: Gangs | None = None
    """Of `export`: all ranks of these call it, and each writes a part of the files. None: this process alone."""
    timeout: timedelta = timedelta(hours=1)
    """With `gangs`: how long the ranks may take for one phase, such as to write."""

    def check_alone(self, verb: str) -> None:
        """`ValueError` if several ranks are to do what one process does."""
        if self.gangs is not None and self.gangs.root.size > 1:
            raise ValueError(f"{verb} is done by one process: call it on one rank, without gangs")


class ToldSource(SourceAround):
    """As `source`; each read is told."""

    def __init__(self, source: TensorSource, told: Callable[[int], None]) -> None:
        super().__init__(source)
        self._told = told

    def crc(self, name: str) -> int | None:
        return known_crc(self._source, name)

    def read(self, windows: Sequence[Window]) -> None:
        self._source.read(windows)
        self._told(sum(len(window.into) for window in windows))
