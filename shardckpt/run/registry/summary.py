"""What there is of the runs below a root, as `Runs.list` and `shardckpt runs` tell it."""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.run.registry.one import best_of
from shardckpt.run.registry.runfile import RunInfo, SavedStep


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run, and what there is of it now."""

    folder: str
    number: int
    info: RunInfo | None
    """None if its run.json is damaged, or still being written."""
    steps: tuple[int, ...] = ()
    """The committed steps, ascending."""
    problem: str = ""
    """Why there is no `info`."""

    def best(self, metric: str = "score", *, lower_better: bool = False) -> SavedStep | None:
        """As `Run.best`."""
        return best_of(self.info, self.steps, metric, lower_better=lower_better) if self.info is not None else None


@dataclass(frozen=True, slots=True)
class RunsFound:
    """The runs below a root."""

    runs: tuple[RunSummary, ...]
