"""What a load costs on one rank before a tensor's byte is read: the record, the comparison, the plan, the indexes."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from benchmarks.scale.jobs import Mesh, Rank
from benchmarks.scale.saving import Committed, Planned, commit, timed
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.load import Loader
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fitting.fitter import fit_state
from shardckpt.engine.loading.needs import needs_of, tree_ranks_of
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.manifest import FileEntry, Manifest, decode_manifest
from shardckpt.format.record.columns import FilesByName
from shardckpt.gang.local import LocalGang
from shardckpt.state import Part, StateReader
from shardckpt.storage.base import Read, Storage

FOLDER = "step_100"
_TIMEOUT = timedelta(minutes=5)


class Shelf:
    """A storage of the files of a record, which has their indexes and trees and nothing else; it counts requests."""

    def __init__(self, manifest: Manifest, planned: Mapping[int, Planned]) -> None:
        self.url = "shelf://"
        self.requests = self.nbytes = 0
        self._manifest, self._planned = manifest, planned

    def size(self, key: str) -> int:
        """One request."""
        self.requests += 1
        return self._file(key).nbytes

    def read_into(self, reads: Sequence[Read]) -> None:
        """One request for each."""
        for read in reads:
            file = self._file(read.key)
            content = self._planned[file.writer].contents[file.name][read.offset]
            read.into[:] = content
            self.requests += 1
            self.nbytes += len(content)

    def _file(self, key: str) -> FileEntry:
        file = FilesByName(self._manifest.files).get(key.removeprefix(f"{FOLDER}/"))
        if file is None:
            raise FileNotFoundError(key)
        return file


@dataclass(slots=True)
class LoadCost:
    """Of one rank."""

    seconds: dict[str, float]
    """record: parse and check it; compare: the state with it; plan: find the bytes, read and parse the indexes."""
    record_nbytes: int
    other_nbytes: int
    """Of indexes and trees."""
    requests: int
    objects: int
    """Python objects, of those that the collector looks at, that all this made and keeps."""

    @property
    def nbytes(self) -> int:
        """Of metadata, in all."""
        return self.record_nbytes + self.other_nbytes

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def plan_load(saved: Committed, *, on: Mesh, rank: int) -> LoadCost:
    """A rank of the mesh `on` plans to load what has been saved. The real loader does, but for the talk between ranks.

    Of the files that it opens the record has the true entries: whoever wrote them plans its save for real before.
    """
    one = Rank(on, saved.model, rank)
    at, state = one.coordinates, one.state()
    parts = StateReader().take_apart(state, for_loading=True)
    policy = LoadPolicy(unexpected="ignore", new_world={"data": "own"})  # no rank alone can tell what is unexpected
    needed = _writers_of(decode_manifest(saved.record), at, parts, policy)
    saved = commit(saved.mesh, saved.model, planned=saved.planned, real=needed | saved.planned.keys())
    one.pretend()  # to have been that rank all the time
    gang = LocalGang("root")
    gang.enter("load", timeout=_TIMEOUT)
    with uncollected():
        before = len(gc.get_objects())
        manifest, record_s = timed(lambda: decode_manifest(saved.record))
        shelf = Shelf(manifest, saved.planned)
        terms: dict[str, Any] = {"folder": FOLDER, "manifest": manifest, "timeout": _TIMEOUT}
        loader, made_s = timed(lambda: Loader(cast("Storage", shelf), gang, at, **terms))
        _, compare_s = timed(lambda: loader._compare(parts, policy))
        _, plan_s = timed(loader._plan)
        objects = len(gc.get_objects()) - before
    seconds = {"record": record_s, "compare": made_s + compare_s, "plan": plan_s}
    loader._fetch.release()
    return LoadCost(seconds, len(saved.record), shelf.nbytes, shelf.requests, objects)


def _writers_of(manifest: Manifest, at: Coordinates, parts: Sequence[Part], policy: LoadPolicy) -> set[int]:
    """Who wrote the files that this rank opens."""
    view = policy.selection.view(manifest)
    sources = Sources(view.manifest, at)
    fit = fit_state(parts, sources, policy, view)
    if fit.problems:
        raise RuntimeError(f"a simulated rank cannot load what others saved: {fit.problems[:3]}")
    names = {need[1] for need in needs_of(fit, sources)}
    names |= {name for saver in tree_ranks_of(fit, sources) for name in sources.trees_of(saver)}
    names |= set(Contents(cast("Storage", None), FOLDER, manifest).assigned(at.rank, at.world_size))
    files = FilesByName(manifest.files)
    return {file.writer for name in names if (file := files.get(name))}
