"""Who writes which bytes of files that several ranks make together. Pure; every rank comes to the same answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_GRAIN = 1 << 20
"""Stretches begin at multiples of this: whole pages, of which two machines must never write one together."""
_NUMBERS = 10_000
"""Of parts in an upload."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes `start` to `stop` of a file, which one rank writes."""

    file: int
    start: int
    stop: int
    whole: bool
    """Whether nobody else writes any of it."""
    numbers: range = range(1, _NUMBERS + 1)
    """In an upload, the numbers that the parts of this stretch may have."""


def share_out(sizes: Sequence[int], ranks: int, *, least: int | None) -> list[list[Stretch]]:
    """For each rank what it writes of files of these sizes, in bytes: all of it taken together, stretches as even as
    can be, one after the other. None is shorter than `least`, if not its file is; None: a file is written by one rank.
    """
    if least is None:
        return _whole_files(sizes, ranks)
    total, begin = sum(sizes), 0
    shares: list[list[Stretch]] = [[] for _ in range(ranks)]
    for file, nbytes in enumerate(sizes):
        # (rank, where in this file what it has of all bytes begins); the first has the file's first byte.
        starts = [(rank, max(total * rank // ranks - begin, 0) // _GRAIN * _GRAIN) for rank in range(ranks)]
        cuts: list[tuple[int, int]] = []
        for rank, at in starts:
            if at == 0:
                cuts = [(rank, 0)]  # those before it end before this file begins
            elif at - cuts[-1][1] >= least and nbytes - at >= least:
                cuts.append((rank, at))
        room = _NUMBERS // len(cuts)
        ends = [at for _, at in cuts[1:]] + [nbytes]
        for number, ((rank, at), end) in enumerate(zip(cuts, ends, strict=True)):
            numbers = range(number * room + 1, (number + 1) * room + 1)
            shares[rank].append(Stretch(file, at, end, len(cuts) == 1, numbers))
        begin += nbytes
    return shares


def _whole_files(sizes: Sequence[int], ranks: int) -> list[list[Stretch]]:
    """Each file to the rank that has the least to do so far."""
    shares: list[list[Stretch]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for file, nbytes in enumerate(sizes):
        rank = load.index(min(load))
        load[rank] += nbytes
        shares[rank].append(Stretch(file, 0, nbytes, whole=True))
    return shares
