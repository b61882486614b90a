"""What dead attempts left behind: found by watching that nothing happens to it any more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from shardckpt.format.layout import parse_aside
from shardckpt.run.catalog import Catalog
from shardckpt.run.deletion import sweep

_log = logging.getLogger(__name__)

_Content = tuple[tuple[str, int], ...]
"""Names and sizes of the files of a folder."""


class DeadAttempts:
    """Sweeps attempts (`step_N.<attempt>.tmp`) of jobs that died. Rank 0 only, on the save thread, after commits.

    An attempt may belong to another job that is alive. So it is taken for dead only if this process has seen it twice,
    at least `grace` apart by its own monotonic clock, with the same files of the same sizes: a live gang gives up an
    attempt on which nothing happens long before. Modification times, which jump with clocks, decide nothing. A job
    shorter than `grace` sweeps nothing; the next one may. (On object stores nothing is swept yet: they have no such
    folders, only objects below a step that no record names.)
    """

    def __init__(self, catalog: Catalog, *, grace: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog = catalog
        self._grace_s = grace.total_seconds()
        self._clock = clock
        self._seen: dict[str, tuple[float, _Content]] = {}

    def tidy(self) -> list[str]:
        """Look, remember, and sweep what has not changed for long enough; gives the folders that are gone."""
        now, still, dead = self._clock(), {}, {}
        for folder in self._catalog.storage.list():
            aside = parse_aside(folder) if folder.endswith("/") else None
            if aside is None or aside.kind != "tmp":
                continue
            content = self._content(aside.folder)
            since, known = self._seen.get(aside.folder, (now, content))
            still[aside.folder] = (since if known == content else now, content)
            if now - still[aside.folder][0] >= self._grace_s and known == content and aside.folder in self._seen:
                dead[aside.attempt] = aside.step
        self._seen = still
        swept = sweep(self._catalog, own_attempts=dead) if dead else []
        for folder in swept:
            _log.info("removed %s, left by a save that never committed", folder)
        return swept

    def _content(self, folder: str) -> _Content:
        """What lies in it now; what goes away under our eyes is no content."""
        storage, found = self._catalog.storage, []
        for name in storage.list(folder):
            try:
                found.append((name, 0 if name.endswith("/") else storage.size(f"{folder}/{name}")))
            except FileNotFoundError:
                continue
        return tuple(found)
