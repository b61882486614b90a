"""What stands in the cells of a table: numbers over rounds, and ratios of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the rounds, each round counted once."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """None if there are no numbers."""
        found = sorted(numbers)
        return cls(median(found), found[0], found[-1]) if found else None


def table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in which nothing stands are left out."""
    if not rows:
        return []
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"**{heading}**", "", *(f"| {' | '.join(line[number] for number in filled)} |" for line in lines)]


def _formatted(write: Callable[[float], str]) -> Callable[[Spread | None], str]:
    def cell(spread: Spread | None) -> str:
        if spread is None:
            return ""
        return f"{write(spread.middle)} ({write(spread.least)}-{write(spread.most)})"

    return cell


seconds = _formatted(lambda seconds: f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}")
milliseconds = _formatted(lambda seconds: f"{seconds * 1e3:.0f}" if abs(seconds) >= 0.01 else f"{seconds * 1e3:.1f}")

ratio = _formatted(lambda ratio: f"{ratio:.3f}")


def percent(spread: Spread | None) -> str:
    return f"{spread.middle:.0%} ({spread.least:.0%}-{spread.most:.0%})" if spread else ""


def over(read: Spread | None, needed: int) -> str:
    return f"{read.middle / needed:.2f}" if read and needed else ""


def mb(spread: Spread | None) -> str:
    return f"{spread.middle / 1e6:.0f}" if spread else ""


def times(spread: Spread | None, ours: Spread | None) -> str:
    if spread is None or ours is None or min(spread.middle, ours.middle) <= 0:
        return ""  # a loss that drowns in the noise is none
    return f"{spread.middle / ours.middle:.1f} x" if spread is not ours and spread != ours else "1"


def share(rate: float, limit: float | None) -> str:
    return f"{rate / limit:.0%}" if limit and rate else ""
