"""What an examination found, as data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "problem"]
"""note: it works, at a cost or with something worth knowing. problem: a promise cannot be kept there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    what: str
    """What was found, for people."""
    advice: str = ""
    """What it costs, and what to set; empty if there is nothing to do."""
    value: float | None = None
    """The number in `what`, where there is one: in `unit`."""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """Of this machine and, if one was named, of a place."""

    url: str | None
    """Without credentials."""
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is a problem."""
        return all(finding.level != "problem" for finding in self.findings)


def bytes_text(nbytes: float) -> str:
    """For people, in decimal units: "1.5 GB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
