"""Which steps are kept: pins, metrics, pruning by call, the best one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, SupportsFloat

from shardckpt.engine.save import Saver
from shardckpt.manager.talk import Talk
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.keeping.metrics import plain_metrics
from shardckpt.run.keeping.pins import pin, pinned_steps, unpin
from shardckpt.run.prune import Fate
from shardckpt.run.retention import Policy


class KeepingFace:
    """`pin`, `unpin`, `pinned`, `save_metrics`, `best`, `keep_links`, `prune`.

    All are called by all ranks, in the same order, on the training's thread.
    """

    _saver: Saver
    _talk: Talk
    _catalog: Catalog
    _history: History

    def pin(self, step: int) -> None:
        """Keep this committed step, whatever a policy says, until `unpin`. Known to every job that works on the run."""
        self._do("pin", lambda: pin(self._catalog, step), step=step)

    def unpin(self, step: int) -> None:
        """Take the pin away, if there is one."""
        self._do("unpin", lambda: unpin(self._catalog.storage, step), step=step)

    def pinned(self) -> list[int]:
        """The steps that are pinned, ascending."""
        return list(self._do("pinned", lambda: sorted(pinned_steps(self._catalog.storage))))

    def save_metrics(self, metrics: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Give numbers by name to a step that is committed or still being saved, beside those that it has; rank 0's are
        taken. `KeepBest(n, metric=name)` compares by them. What is given before the record of the step is written is
        there as soon as the step is, also if the job dies at that moment."""
        pending = self._saver.of_step(step)
        self._do("measure", lambda: self._history.measure(step, plain_metrics(metrics), save=pending), step=step)

    def best(self) -> int | None:
        """The best step, by the `KeepBest` of `keep`, or else by the score, of which more is better. None if no step
        has been scored."""
        _, steps, _ = self._do("best", self._history.best_first)
        return steps[0] if steps else None

    def keep_links(self) -> None:
        """From now on have `latest` and `best` in the root lead to the newest step and to the best, by `best`, wherever
        the storage has symbolic links. They are for people: nothing here reads them."""
        self._history.links = True
        self._do("links", self._history.relink)

    def prune(self, policy: Policy | None = None, *, dry_run: bool = False) -> list[Fate]:
        """Delete what the policy (the manager's own, if none is given) does not keep, or all but the models where it
        keeps those, and say of each step why it stays or goes; with `dry_run` only say so. The last step, the one that
        was resumed from, the one that `best` names and pinned ones stay, whatever it says."""
        self._saver.drain()  # a step that is being replaced must not be deleted
        act = partial(self._history.plan if dry_run else self._history.apply, policy)
        return [Fate(**fate) for fate in self._do("prune", lambda: [asdict(fate) for fate in act()])]

    def _do(self, verb: str, work: Callable[[], Any], *, step: int | None = None) -> Any:
        """By rank 0; all get what it gives, which is JSON."""
        self._talk.enter(verb if step is None else f"{verb}/{step}", step=step)
        return self._talk.from_rank_0(work, verb, step=step)
