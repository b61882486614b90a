"""From a step to what is in it: its record, told to all; the newest step that is good; steps of the model alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.kinds import Loaded
from shardckpt.engine.load import Loader
from shardckpt.engine.loading.fetching.bar import shown
from shardckpt.engine.loading.selecting.selection import Selection
from shardckpt.engine.loading.selecting.whole import keys_of
from shardckpt.engine.pending import CheckpointInfo, Tell
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointLoadError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)
from shardckpt.format.manifest import Manifest, decode_manifest, encode_manifest
from shardckpt.manager.talk import Talk
from shardckpt.run.catalog import Catalog
from shardckpt.state import Part
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)


class ModelOnlyError(CheckpointMismatchError):
    """Of the step only the model is there, and the state asks for more."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Called by all ranks, on the training's thread."""

    storage: Storage
    catalog: Catalog
    talk: Talk
    at: Coordinates
    tell: Tell = lambda kind, step, /, **what: None

    def record(self, step: int) -> tuple[str, Manifest]:
        """The folder and the record of a step. Rank 0 reads, all are told. In a conversation."""
        own: list[Manifest] = []

        def read() -> list[str]:
            folder, manifest = self.catalog.record(step)
            own.append(manifest)
            return [folder, encode_manifest(manifest).decode() if self.at.world_size > 1 else ""]

        folder, record = self.talk.from_rank_0(read, "read the record", step=step)
        return str(folder), own[0] if own else decode_manifest(str(record).encode())

    def in_turn(self, steps: Callable[[], Iterator[int]]) -> Iterator[int]:
        """The steps that rank 0 finds, one after the other, each only when it is asked for; all ranks get the same."""
        found: list[Iterator[int]] = []

        def following() -> int | None:
            if not found:
                found.append(steps())
            return next(found[0], None)

        while True:
            self.talk.enter("steps")
            step = self.talk.from_rank_0(following, "list the steps")
            if step is None:
                return
            yield int(step)

    def newest_first(self) -> Iterator[int]:
        """The committed steps, descending, sound or not; costs no more than are taken."""
        return self.in_turn(lambda: (entry.step for entry in self.catalog.newest_first()))

    def loader(self, folder: str, manifest: Manifest) -> Loader:
        """Who loads it, or says what loading it would do."""
        gang, timeout = self.talk.gang, self.talk.timeout
        return Loader(self.storage, gang, self.at, folder=folder, manifest=manifest, timeout=timeout)

    @contextmanager
    def loading(self, folder: str, manifest: Manifest) -> Iterator[Loader]:
        """Who loads it; when that has succeeded, it is told. Rank 0 shows how far it is, where a person waits."""
        began = time.perf_counter()
        loader = self.loader(folder, manifest)
        bar = shown(loader.meter, f"step {manifest.step}", alone=self.at.world_size == 1)
        with bar if self.at.rank == 0 else nullcontext():
            yield loader
        self.tell(Loaded, manifest.step, seconds=time.perf_counter() - began, nbytes=manifest.nbytes)

    def info(self, folder: str, manifest: Manifest) -> CheckpointInfo:
        """What a caller is told of a step."""
        url = f"{self.storage.url.rstrip('/')}/{folder}"
        metadata = dict(manifest.metadata)
        return CheckpointInfo(manifest.step, url, manifest.nbytes, manifest.world_size, manifest.created, metadata)

    def first_good(self, steps: Iterable[int], load: Callable[[int], Any], *, fresh: bool) -> tuple[int, Any] | None:
        """The first of the steps that `load` loads; None if there is none at all. It passes over damaged ones.

        `load` ends alike on all ranks. `CheckpointLoadError` if there are steps, but none is good, unless `fresh` (and
        no attempt has changed the state).
        """
        skipped: list[tuple[int, str]] = []
        changed = False
        for step in steps:
            try:
                loaded = load(step)
            except (CheckpointDamagedError, CheckpointNotFoundError, ModelOnlyError) as error:
                _log.warning("step %d is passed over: %s", step, error)
                skipped.append((step, str(error)))
                changed |= isinstance(error, CheckpointLoadError) and error.state_changed
                continue
            if isinstance(loaded, CheckpointInfo):
                loaded = replace(loaded, skipped=tuple(skipped))
            return step, loaded
        if skipped and (changed or not fresh):
            listed = "".join(f"\n  step {step}: {reason}" for step, reason in skipped)
            raise CheckpointLoadError(
                f"no step at {self.storage.url} can be resumed from, but there are {len(skipped)} others:{listed}\n"
                + (
                    "Tensors of the state hold bytes of a damaged step: start the program again, without in_place"
                    if changed
                    else "Repair one, or start afresh with allow_fresh_start=True"
                )
            )
        return None


def check_asks_for_model_only(parts: Sequence[Part], manifest: Manifest, selection: Selection) -> None:
    """`ModelOnlyError` if more than the model is to be loaded, of a step that has only that."""
    if not manifest.model_only and set(manifest.parts) != {manifest.model_key}:
        return
    asked = [part for part in parts if any(map(selection.takes, keys_of([part])))]
    more = sorted({str(part.path[0]) for part in asked if not manifest.is_of_model(selection.saved_name(part.key))})
    if more:
        raise ModelOnlyError(
            f"of step {manifest.step} only the model is there ({manifest.model_key!r}), and the state asks for "
            f"{', '.join(more)} as well: load the model alone, or another step",
            problems=[f"missing: {key}" for key in more],
            step=manifest.step,
        )
