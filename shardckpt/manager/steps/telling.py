"""`subscribe`, and callbacks of the user's own: what happens to checkpoints, told to programs that want to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.kinds import Committed, Deleted, Event, Measured, SaveFailed, SaveStarted
from shardckpt.engine.events.listener import Subscriber
from shardckpt.engine.events.stream import EventStream
from shardckpt.format.layout import step_folder
from shardckpt.run.prune import Deleted as Gone
from shardckpt.storage.base import Storage

_PATIENCE = timedelta(minutes=10)
"""How long a callback may take, unless something else is said: uploads do."""


class TellingFace(ABC):
    """`subscribe`, `on_save`, `on_commit`, `on_failure`, `on_delete`: called by any rank by itself, on any thread.

    Each subscriber and callback has a thread of its own, in which it is called with one event after the other. What it
    raises is logged, and told to the other subscribers (`SubscriberFailed`), and so is that it does not return in time;
    saves, loads and training know nothing of it. It must not call methods of the manager, which are for all ranks at
    once, and it shares the processor and the interpreter with training: what takes much of either belongs in a process
    of its own.
    """

    _at: Coordinates
    _events: EventStream
    _storage: Storage

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Have it called with every `Event` of this rank from now on; call what is given back to end that.

        `close` lets it hear all that was told, and waits for it for 5 s at most.
        """
        return self._events.subscribe(subscriber)

    def on_save(
        self, callback: Callable[[SaveStarted], object], *, patience: timedelta = _PATIENCE, each_rank: bool = False
    ) -> Callable[[], None]:
        """Call it when a save has begun, on rank 0; with `each_rank` on every rank that asks for it.

        All of `on_save`, `on_commit`, `on_failure` and `on_delete` give back what ends it, and have these terms:

        Args:
            callback: called with the event, in a thread of its own.
            patience: how long it may take over one event. `close` (the end of the `with`) waits for it as long, but
                after `should_stop` no longer than the budget lasts; what then has not returned is left behind.
            each_rank: whether it is called on this rank, too, if that is not rank 0.
        """
        return self._call(callback, SaveStarted, patience=patience, each_rank=each_rank)

    def on_commit(
        self, callback: Callable[[Committed], object], *, patience: timedelta = _PATIENCE, each_rank: bool = False
    ) -> Callable[[], None]:
        """Call it when a step has become a checkpoint: `event.step`, `event.url`, and `event.report` of what it cost.

        While it is at work on a step, or a step waits for it, on rank 0, no policy deletes that step; after that, the
        next pruning may. `delete_checkpoint` does at once. All files of the checkpoint are there; a score or metrics
        may still be written beside them (`*.tmp`, then renamed). A program that is killed may not have called it for
        its last steps: compare with `steps()` after `resume`. Terms as in `on_save`.
        """
        return self._call(callback, Committed, patience=patience, each_rank=each_rank, holds=True)

    def on_failure(
        self, callback: Callable[[SaveFailed], object], *, patience: timedelta = _PATIENCE, each_rank: bool = False
    ) -> Callable[[], None]:
        """Call it when a save was not committed: `event.error`. Terms as in `on_save`."""
        return self._call(callback, SaveFailed, patience=patience, each_rank=each_rank)

    def on_delete(
        self, callback: Callable[[Deleted], object], *, patience: timedelta = _PATIENCE
    ) -> Callable[[], None]:
        """Call it, on rank 0, when a step was deleted, or all of it but its model (`event.model_kept`): `event.url` is
        where it lay, `event.reason` why. Terms as in `on_save`."""
        return self._call(callback, Deleted, patience=patience, each_rank=False)

    def _call(
        self,
        callback: Subscriber,
        kind: type[Event],
        *,
        patience: timedelta,
        each_rank: bool,
        holds: bool = False,
    ) -> Callable[[], None]:
        if self._at.rank != 0 and not each_rank:
            return lambda: None
        return self._events.subscribe(callback, kind, patience=patience, holds=holds)

    def _tellers(self) -> dict[str, Any]:
        """For `History`: whom it tells what, and whom it asks which steps are to stay."""

        def deleted(gone: Gone) -> None:
            url = f"{self._storage.url.rstrip('/')}/{step_folder(gone.step)}"
            self._events.tell(Deleted, gone.step, url=url, reason=gone.reason, model_kept=gone.model_kept)

        def measured(step: int, metrics: Mapping[str, float]) -> None:
            self._events.tell(Measured, step, metrics=dict(metrics))

        return {"on_deleted": deleted, "on_measured": measured, "held": self._events.held}

    @abstractmethod
    def _left_of_budget(self) -> timedelta | None:
        """Of the time until this program is killed, if it was told to stop."""

    def _stop_telling(self) -> None:
        self._events.close(limit=self._left_of_budget())
