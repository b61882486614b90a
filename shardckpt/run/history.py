"""What rank 0 does for a run beside its saves: scores that wait for their commit, protected steps, pruning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.run.prune import Deleted, retain
from shardckpt.run.retention import Policy, prefers_lower
from shardckpt.run.scores import encode_score, write_score
from shardckpt.run.shared.sweeping import tidy_blobs

_log = logging.getLogger(__name__)


class History:
    """One per manager. `committed` runs on the save thread of rank 0, all else on the training's thread there."""

    def __init__(
        self,
        catalog: Catalog,
        policy: Policy,
        *,
        grace: timedelta,
        on_deleted: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._catalog = catalog
        self.on_deleted = on_deleted
        self._leftovers = DeadAttempts(catalog, grace=grace)
        self._policy = policy
        self._due: dict[int, float] = {}
        self._protected: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def prefers_lower(self) -> bool:
        """Whether the policy of the run takes lower scores for better ones."""
        return prefers_lower(self._policy)

    def protect(self, step: int, reason: str) -> None:
        """Never prune this step while the job lives."""
        with self._lock:
            self._protected[step] = reason

    def note(self, step: int, score: float, *, over: Callable[[], bool]) -> bool:
        """Keep a score until its step is committed. False if the save is over: then it must be written now."""
        encode_score(score)
        with self._lock:
            if over():
                return False
            self._due[step] = score
            return True

    def write_score(self, step: int, score: float) -> None:
        """Give a committed step its score. On rank 0."""
        write_score(self._catalog.storage, self._catalog.entry(step), score=score)

    def retain(self, policy: Policy, *, preserve_model: bool = False) -> list[Deleted]:
        """Delete what this policy does not keep, whatever the run's own policy is; see `shardckpt.run.prune.retain`.

        While no save is under way, for a step that is being replaced must not be deleted.
        """
        with self._lock:
            protected = dict(self._protected)
        return self._told(retain(self._catalog, policy, preserve_model=preserve_model, protected=protected))

    def committed(self, step: int) -> list[int]:
        """After a commit: write the score that was waiting, prune, and give the deleted steps.

        What goes wrong here is logged: the step is committed all the same, and the next commit prunes again.
        """
        with self._lock:
            score = self._due.pop(step, None)
            protected = {**self._protected, step: "the step that was just saved"}
        if score is not None:
            try:
                self.write_score(step, score)
            except Exception:
                _log.exception("step %d is committed, but its score was not written", step)
        try:
            self._leftovers.tidy()
        except Exception:
            _log.exception("step %d is committed, but the leftovers of other saves were not looked at", step)
        try:
            return [gone.step for gone in self._told(retain(self._catalog, self._policy, protected=protected))]
        except Exception:  # a policy of the user's may raise anything
            _log.exception("step %d is committed, but older steps were not pruned", step)
            return []

    def deleted(self, step: int) -> None:
        """Somebody has deleted this step, or reduced it to its model, by its name."""
        tidy_blobs(self._catalog.storage)
        self.on_deleted(step)

    def _told(self, deleted: list[Deleted]) -> list[Deleted]:
        for gone in deleted:
            self.on_deleted(gone.step)
        return deleted
