"""Checksums of tensors that are read window by window, in any order, by any threads.

CRC-32 is linear (see `engine.loading.integrity`): what was read of a record is summed up at its place among zeros, and
when every byte of a tensor has been read once, the sums of its records are held against the CRCs that were written.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardckpt.engine.loading.integrity import zero_crc
from shardckpt.tools.moving.reading.spread import RecordName, Spread


@dataclass(slots=True)
class _Begun:
    """A tensor of which some has been read: which bytes, in order and apart, and the sums of its records."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    sums: dict[RecordName, int] = field(default_factory=dict)

    def add(self, start: int, stop: int, sums: Mapping[RecordName, int]) -> bool:
        """False, with nothing done, if some of these bytes have been read before."""
        at = bisect.bisect_left(self.spans, (start, start))
        if (at and self.spans[at - 1][1] > start) or (at < len(self.spans) and self.spans[at][0] < stop):
            return False
        if at < len(self.spans) and self.spans[at][0] == stop:
            stop = self.spans.pop(at)[1]
        if at and self.spans[at - 1][1] == start:
            start = self.spans.pop(at - 1)[0]
            at -= 1
        self.spans.insert(at, (start, stop))
        for record, total in sums.items():
            self.sums[record] = self.sums.get(record, 0) ^ total
        return True


@dataclass(frozen=True, slots=True)
class PartlyRead:
    """What one process has read of a tensor, not all of which it wanted; travels as JSON."""

    name: str
    spans: tuple[tuple[int, int], ...]
    sums: Mapping[RecordName, int]

    def encode(self) -> list[Any]:
        sums = [[file, number, total] for (file, number), total in self.sums.items()]
        return [self.name, [list(span) for span in self.spans], sums]

    @classmethod
    def decode(cls, content: Any) -> PartlyRead:
        name, spans, sums = content
        return cls(name, tuple((a, b) for a, b in spans), {(file, number): total for file, number, total in sums})


class Coverage:
    """What has been read of which tensors since each was last read to its end. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, _Begun] = {}

    def add(self, spread: Spread, start: int, stop: int, sums: Mapping[RecordName, int]) -> set[str]:
        """These bytes of a tensor have been read; `sums` are those of the records, among zeros.

        Gives the files that have turned out to be damaged, with the last byte of a tensor that is read. Who reads a
        byte again before that begins anew: what came before is then not checked.
        """
        with self._lock:
            begun = self._begun.setdefault(spread.name, _Begun())
            if not begun.add(start, stop, sums):
                begun = self._begun[spread.name] = _Begun()
                begun.add(start, stop, sums)
            if begun.spans != [(0, spread.facts.nbytes)]:
                return set()
            del self._begun[spread.name]
        return {
            name[0]
            for name, record in spread.checkable().items()
            if begun.sums.get(name, 0) != record.crc ^ zero_crc(record.nbytes)
        }

    def take_partly_read(self) -> list[PartlyRead]:
        """What has been read of tensors that have not been read to their ends; it is forgotten here."""
        with self._lock:
            begun, self._begun = self._begun, {}
        return [PartlyRead(name, tuple(each.spans), each.sums) for name, each in begun.items()]
