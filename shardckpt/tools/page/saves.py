"""What the log of saves says (`shardckpt.SaveLog`), read again. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MOST_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a rank did, from when, for how long; in seconds."""

    name: str
    began: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RankSpans:
    """What one rank did in a save, by its own clock."""

    rank: int
    began: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class SaveLine:
    """A save that is over, or what else has happened to a step."""

    event: str
    """"committed", "failed", "unknown", "skipped", "deleted", "loaded", "measured", "subscriber failed"."""
    step: int
    at: float
    """Seconds since 1970."""
    nbytes: int = 0
    """Of the whole checkpoint."""
    stall_s: float = 0.0
    """How long training was held up."""
    total_s: float = 0.0
    """From `save` to the commit."""
    rate: float = 0.0
    """Bytes per second over all of that."""
    slowest_rank: int | None = None
    slowest_s: float = 0.0
    error: str = ""
    ranks: tuple[RankSpans, ...] = ()
    """Empty in what `shardckpt report --json` prints; the log has them."""


def read_saves(path: str | os.PathLike[str]) -> list[SaveLine]:
    """The lines in the order in which they were written; those that are none (a kill cuts the last one off) are
    passed over. `OSError` if the file cannot be read, `ValueError` if it is too large to be a log of saves."""
    with open(path, encoding="utf-8", errors="replace") as file:
        if os.fstat(file.fileno()).st_size > _MOST_NBYTES:
            raise ValueError(f"{os.fspath(path)} is too large for a log of saves")
        return [line for text in file for line in _decoded(text)]


def _decoded(text: str) -> Iterator[SaveLine]:
    try:
        line = json.loads(text)
        yield SaveLine(
            str(line["event"]),
            int(line["step"]),
            _finite(line["at"]),
            int(line.get("nbytes", 0)),
            _finite(line.get("stall_s", 0)),
            _finite(line.get("total_s", 0)),
            _finite(line.get("rate", 0)),
            None if line.get("slowest_rank") is None else int(line["slowest_rank"]),
            _finite(line.get("slowest_s", 0)),
            str(line.get("error", "")),
            tuple(_rank(rank) for rank in line.get("ranks", ())),
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError):
        return


def _rank(content: Any) -> RankSpans:
    rank, began, spans = content
    told = [Span(str(name), _finite(at), _finite(seconds)) for name, at, seconds in spans]
    work = [span for span in told if span.name in ("seal", "put")]
    if work and not any(span.name == "write" for span in told):  # of other ranks rank 0 knows no end of the whole
        start = min(span.began for span in work)
        told.append(Span("write", start, max(span.began + span.seconds for span in work) - start))
    return RankSpans(int(rank), _finite(began), tuple(sorted(told, key=lambda span: span.name != "meet")))


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no measure")
    return number
