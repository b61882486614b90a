"""Load one step: compare, read what is needed, check, agree, and only then change the state.

Runs on the caller's thread of every rank, in conversation over a gang of its own. Whatever goes wrong on one rank
is an error on all, and the state is then as it was; the error says so if it is not (see `Fetch.fill`, `Straight`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.fetching.borrow import fetch_from
from shardckpt.engine.loading.fetching.fetch import Fetch, Fetched, Need, check_region, find_stored
from shardckpt.engine.loading.fetching.meter import Meter
from shardckpt.engine.loading.fetching.straight import Straight, fetch_straight_from
from shardckpt.engine.loading.fit import Fit, WantedTensor
from shardckpt.engine.loading.fitting.claims import mismatch_error
from shardckpt.engine.loading.holdings import Holdings, holdings
from shardckpt.engine.loading.integrity import PartialSum, damage_error, join_sums
from shardckpt.engine.loading.needs import needs_of, place_of, region_in, tree_ranks_of
from shardckpt.engine.loading.once.exchange import is_worth_while, read_once
from shardckpt.engine.loading.optimizers import forget_made_up_state
from shardckpt.engine.loading.restoring import Restorer
from shardckpt.engine.loading.selecting.comparing import Comparing
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.report import LoadPlan
from shardckpt.engine.loading.sources import Sources
from shardckpt.engine.patience import within
from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, GangError
from shardckpt.format.manifest import Manifest
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather
from shardckpt.state import Part
from shardckpt.storage.base import Read, Storage

_log = logging.getLogger(__name__)


class Loader:
    """Loads one committed step into a state. Made anew for each load."""

    def __init__(
        self, storage: Storage, gang: Gang, at: Coordinates, *, folder: str, manifest: Manifest, timeout: timedelta
    ) -> None:
        self._storage = storage
        self._gang = gang
        self._at = at
        self._manifest = manifest
        self._timeout = timeout
        self._sources = Sources(manifest, at)
        self._folder = folder
        self._contents = Contents(storage, folder, manifest)
        self.meter = Meter()
        """How far this rank is."""
        self._fetch: Fetch = Arena(storage, self._contents.key_of)
        self._fit, self._holdings = Fit(), Holdings()
        self._fetched: dict[int, list[Fetched]] = {}
        self._made: dict[tuple[str, int | None], torch.Tensor] = {}  # wanted tensors that the state does not have
        self._merged: dict[str, Any] = {}
        self._in_place = False
        self._changes = False  # whether the state may have changed by now
        self._frames: list[str] | None = None  # that this rank looks after, once it has planned

    def load(self, parts: Sequence[Part], policy: LoadPolicy) -> None:
        """Fill the parts. Raises the same error on every rank: `CheckpointMismatchError` where state and checkpoint
        differ, `CheckpointDamagedError` where stored bytes are not what was written, `CheckpointLoadError` else."""
        self._in_place = policy.in_place
        try:
            with uncollected():
                self._compare(parts, policy)
                sums = self._read_together(parts)
                if self._in_place:  # of one record, some pieces may come one way and some the other: joined together
                    self._changes = True
                    streamed = self._together(lambda: self._stream(parts), "read")
                    sums = [*(sums or ()), *(streamed or ())]
                self._join(sums)
                self._changes = True
                self._together(lambda: self._apply(parts), "apply")
        except BaseException as error:
            forget_made_up_state(parts)
            if isinstance(error, GangError):
                raise self._as_load_error(error) from error
            raise
        finally:
            self._fetch.release()

    def load_everything(self) -> dict[str, Any]:
        """All that this rank held, in nested dicts; errors as for `load`."""
        try:
            gathered: Any = self._together(self._look_at_everything, "compare")
            told = self._announce(lambda: [problem for own in gathered for problem in own][:1000], "compare")
            if told:
                raise mismatch_error(told, self._manifest.step)
            self._join(self._read_together(()))
            state: dict[str, Any] = {}
            self._together(lambda: state.update(self._everything()), "give")
        except GangError as error:
            raise self._as_load_error(error) from error
        finally:
            self._fetch.release()
        return state

    def _look_at_everything(self) -> list[str]:
        self._holdings = holdings(self._manifest, self._sources, self._at)
        self._fit = self._holdings.fit
        return self._fit.problems

    def _everything(self) -> dict[str, Any]:
        self._fill()
        files = [file for rank in self._holdings.ranks for file in self._sources.trees_of(rank)]
        own = self._contents.subtree(list(dict.fromkeys(files)), ())
        others = [self._contents.subtree([file], ()) for file in self._holdings.elsewhere]
        return self._holdings.nested(own, others, step=self._manifest.step)

    @property
    def left(self) -> Mapping[str, str]:
        """What of this rank's state the load left as it was -> why."""
        return self._fit.left

    def plan(self, parts: Sequence[Part], policy: LoadPolicy) -> LoadPlan:
        """What `load` would do; see `LoadPlan`. Nothing changes. `CheckpointLoadError` if a rank cannot tell."""
        try:
            return self._comparing().plan(parts, policy, f"{self._storage.url.rstrip('/')}/{self._folder}")
        except GangError as error:
            raise self._as_load_error(error) from error
        finally:
            forget_made_up_state(parts)

    def _compare(self, parts: Sequence[Part], policy: LoadPolicy) -> None:
        """Every difference of every rank, in one error on all ranks."""
        self._fit, self._sources, told = self._comparing().compare(parts, policy)
        if told:
            raise mismatch_error(told, self._manifest.step)

    def _comparing(self) -> Comparing:
        return Comparing(self._gang, self._at, self._manifest, self._timeout)

    def _read_together(self, parts: Sequence[Part]) -> Any:
        """All bytes that the ranks need; of an object store each only once, as far as they need the same."""
        if is_worth_while(self._storage, self._gang):
            terms: dict[str, Any] = {"timeout": self._timeout, "step": self._manifest.step, "meter": self.meter}
            done = read_once(self._storage, self._gang, self._plan, **terms)
            if isinstance(self._fetch, Arena):
                self._fetch.have(done)
        read = partial(within, self._timeout, partial(self._read, parts), what="reading")

        def read_and_merge() -> Any:
            sums = read()
            if not isinstance(self._fetch, Straight):
                self._merge(parts)
            return sums

        return self._together(read_and_merge, "read")

    def _plan(self) -> Sequence[Read]:
        """Open the files that have what this rank needs, and find where it lies; gives what is to be fetched."""
        needs = needs_of(self._fit, self._sources)
        frames = self._contents.assigned(self._at.rank, self._at.world_size)
        if self._fit.selection.is_partial:  # files of which nobody needs anything may be lost or damaged
            frames = sorted(self._sources.files().intersection(frames))
        own = (file for rank in tree_ranks_of(self._fit, self._sources) for file in self._sources.trees_of(rank))
        trees = [*own, *self._holdings.elsewhere]
        self._contents.check_sizes(frames)
        self._contents.open(files := {need[1] for need in needs} | set(frames), trees)
        fetch = fetch_straight_from if self._in_place else fetch_from
        self._fetch = fetch(self._storage, self._contents.key_of, files, self.meter)
        straight = self._fetch if isinstance(self._fetch, Straight) else None
        for position, file, chunk_box, region, target in needs:
            wanted = self._fit.tensors[position]
            saved_name = self._fit.selection.saved_name(wanted.name)
            stored = find_stored(self._contents.boxes(file), saved_name, chunk_box, file)
            if saved_name != wanted.name:
                stored = stored._replace(name=wanted.name)  # as which it is summed up
            record = self._contents.record(file, stored)
            region = region_in(stored, chunk_box, region)
            check_region(record, region, self._sources.tensor(wanted.name, wanted.rule), file=file, name=wanted.name)
            need = Need(file, stored, region, target, position)
            if straight is not None and straight.take(need, record, place_of(self._target(wanted), need)):
                continue
            self._fetched.setdefault(position, []).append(self._fetch.add(need, record))
        self._frames = frames
        return self._fetch.reads() if isinstance(self._fetch, Arena) else ()

    def _read(self, parts: Sequence[Part]) -> list[Any]:
        """All bytes that this rank needs, checked as far as it can alone; gives the sums of what it read in part."""
        if self._frames is None:
            self._plan()
        frames = self._frames or []
        damaged, partial = self._fetch.read(self._contents.frame_reads(frames))
        damaged += self._contents.damaged_frames(frames)
        self._refuse(damaged)
        self._restorer().match_groups(parts)  # what does not fit must be known before the changes
        return [item.encode() for item in partial]

    def _stream(self, parts: Sequence[Part]) -> list[Any]:
        """The rest of the bytes, straight into the state; gives the sums of what was read in part."""
        if not isinstance(self._fetch, Straight):
            return []
        damaged, partial = self._fetch.stream(self._timeout)
        self._refuse(damaged)
        self._merge(parts)
        return [item.encode() for item in partial]

    def _join(self, gathered: list[Any] | None) -> None:
        """Check the records that no rank read whole, from all ranks' sums."""

        def join() -> list[str]:
            damaged, unchecked = join_sums(PartialSum.decode(item) for own in gathered or () for item in own)
            if unchecked:
                _log.info("step %d: %d bytes were read in part and not checked", self._manifest.step, unchecked)
            return damaged

        self._refuse(self._announce(join, "check"))

    def _apply(self, parts: Sequence[Part]) -> None:
        """The state changes here and nowhere else; random streams last."""
        self._fill()
        self._restorer().restore(parts, self._made, self._merged)

    def _restorer(self) -> Restorer:
        return Restorer(self._fit, self._sources, self._contents)

    def _merge(self, parts: Sequence[Part]) -> None:
        """What functions make of the values of all ranks, before anything of the state changes."""
        if self._fit.merges:
            self._fill(lambda wanted: wanted.rank is not None)
            self._merged = self._restorer().merged(parts, self._made)

    def _fill(self, which: Callable[[WantedTensor], bool] = lambda wanted: wanted.rank is None) -> None:
        """Put what was fetched into the wanted tensors."""
        places = []
        for position, wanted in enumerate(self._fit.tensors):
            if which(wanted):
                target = self._target(wanted)  # also of an empty one, for which nothing was fetched
                places += [(item, place_of(target, item.need)) for item in self._fetched.get(position, ())]
        self._fetch.fill(places, timeout=self._timeout)

    def _target(self, wanted: WantedTensor) -> torch.Tensor:
        if wanted.local is not None:
            return wanted.local
        if wanted.key not in self._made:
            self._made[wanted.key] = torch.empty(wanted.shape, dtype=getattr(torch, wanted.dtype))
        return self._made[wanted.key]

    def _together(self, work: Any, phase: str) -> Any:
        return together_gather(self._gang, work, phase=phase, timeout=self._timeout, step=self._manifest.step)

    def _announce(self, work: Any, phase: str) -> Any:
        return announce(self._gang, work, phase=phase, timeout=self._timeout, step=self._manifest.step)

    def _refuse(self, damaged: Iterable[str]) -> None:
        """`CheckpointDamagedError` if there are any such files."""
        if names := sorted(set(damaged)):
            raise damage_error(names, step=self._manifest.step, url=self._storage.url, changed=self._changes)

    def _as_load_error(self, error: GangError) -> CheckpointLoadError:
        """Damage found on one rank is damage on all; everything else is a load that failed."""
        kinds = {failure.kind for failure in error.failures.values()}
        damage = kinds & {CheckpointDamagedError.__name__, "FileNotFoundError", "EOFError"}
        kind = CheckpointDamagedError if damage and not error.absent else CheckpointLoadError
        told = kind(f"step {self._manifest.step} was not loaded: {error.brief}", step=self._manifest.step)
        told.state_changed = self._changes
        return told
