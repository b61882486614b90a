"""How large requests are, and how many are under way."""

from __future__ import annotations

from dataclasses import dataclass

_MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Transfers:
    """How large and how many: a put holds up to `whole_nbytes` once more in memory, a read up to `wave_nbytes`."""

    whole_nbytes: int = 128 * _MiB
    """Objects up to this size go out in one call of the back end, larger ones in parts."""
    part_nbytes: int = 32 * _MiB
    request_nbytes: int = 8 * _MiB
    """Longer ranges are read by several requests at once."""
    wave_nbytes: int = 128 * _MiB
    concurrency: int = 16
    deletes_per_second: float | None = None
    """Objects that are deleted per second at most, by all threads of a storage together."""
