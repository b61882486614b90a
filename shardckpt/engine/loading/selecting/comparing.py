"""Do state and checkpoint fit, on all ranks? And what would a load do? In a conversation, on the caller's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.fitting.claims import claim, unclaimed, unexpected_keys
from shardckpt.engine.loading.fitting.fitter import fit_state
from shardckpt.engine.loading.selecting.numbered import selection_of
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.reads import reads_of
from shardckpt.engine.loading.selecting.report import FileReads, LoadPlan, RankReads
from shardckpt.engine.loading.selecting.whole import keys_of, parameters_of
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.manifest import Manifest
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather
from shardckpt.state import Part

_MOST = 1000
"""Differences that are told of, of one rank and of all; a state that has more is another one."""


@dataclass(slots=True)
class Comparing:
    """One state and one step. Made anew for each load; `compare` first."""

    gang: Gang
    at: Coordinates
    manifest: Manifest
    timeout: timedelta

    def compare(self, parts: Sequence[Part], policy: LoadPolicy) -> tuple[Fit, Sources, list[str]]:
        """What this rank takes, where it lies, and every difference of every rank, which all ranks are told."""
        fit, sources = Fit(selection=policy.selection), Sources(self.manifest, self.at)

        def compare() -> list[Any]:
            nonlocal fit, sources
            view = selection_of(policy, parts, self.manifest).view(self.manifest)
            sources = Sources(view.manifest, self.at)
            fit = fit_state(parts, sources, policy, view)
            said = fit.selection.say(partial(keys_of, parts), self.manifest, partial(parameters_of, parts))
            return [fit.problems[:_MOST], fit.claims, said]  # of thousands of ranks all would be too long a message

        gathered: Any = self._gather(compare, "compare")

        def join() -> list[str]:
            told = fit.selection.problems([said for _, _, said in gathered])
            if told and told[0].startswith("policy:"):
                return told  # what else there is follows from that
            told += [problem for own, _, _ in gathered for problem in own]
            return (told + unexpected_keys(sources, fit, [claims for _, claims, _ in gathered]))[:_MOST]

        return fit, sources, self._announce(join, "compare")

    def plan(self, parts: Sequence[Part], policy: LoadPolicy, url: str) -> LoadPlan:
        """What a load would do; nothing changes. `url` is that of the step."""
        fit, sources, problems = self.compare(parts, policy)
        keys = sorted({key for table in self.manifest.tables for key in (*table.tensors, *table.values)})

        def own() -> list[Any]:
            reads = reads_of(fit, sources, self.manifest, self.at.rank)
            files = [[file.file, file.ranges, file.nbytes] for file in reads.files]
            taken = {fit.selection.saved_name(name) for name in _taken(fit, sources)}
            return [files, reads.index_nbytes, sorted(_changed(fit)), fit.left, claim(keys, taken)]

        gathered: Any = self._gather(own, "plan")

        def join() -> list[Any]:
            changed = sorted({name for said in gathered for name in said[2]})
            left = {name: why for said in reversed(gathered) for name, why in sorted(said[3].items())}
            dropped = list(unclaimed(keys, [said[4] for said in gathered]))
            return [[[files, about] for files, about, *_ in gathered], changed, left, dropped]

        ranks, changed, left, dropped = self._announce(join, "plan")
        return LoadPlan(
            step=self.manifest.step,
            url=url,
            stored_nbytes=self.manifest.nbytes,
            ranks=tuple(_rank_reads(rank, *said) for rank, said in enumerate(ranks)),
            changed=tuple(changed),
            left=left,
            dropped=tuple(dropped),
            problems=tuple(dict.fromkeys(problems)),
        )

    def _gather(self, work: Any, phase: str) -> Any:
        return together_gather(self.gang, work, phase=phase, timeout=self.timeout, step=self.manifest.step)

    def _announce(self, work: Any, phase: str) -> Any:
        return announce(self.gang, work, phase=phase, timeout=self.timeout, step=self.manifest.step)


def _changed(fit: Fit) -> set[str]:
    """The keys that are loaded; a part that loads itself has one."""
    whole = {key for key, ranks in fit.trees.items() if ranks}
    whole |= fit.extra.keys()
    names = {wanted.name for wanted in fit.tensors} | {value.key for value in fit.values}
    return whole | {name for name in names if not any(name.startswith(f"{key}.") for key in whole)}


def _taken(fit: Fit, sources: Sources) -> set[str]:
    """The same, key by key."""
    names = {wanted.name for wanted in fit.tensors} | {value.key for value in fit.values}
    for key in (key for key, ranks in fit.trees.items() if ranks):
        kept = f"{key}.state." if key in fit.stateless else None  # of an optimizer's tensors only those that it has
        below = sources.under(key)
        names |= {name for name in below if not (kept and name.startswith(kept) and sources.tensor(name))}
    return names.union(*map(sources.under, fit.extra))


def _rank_reads(rank: int, files: Sequence[Sequence[Any]], index_nbytes: int) -> RankReads:
    return RankReads(rank, tuple(FileReads(*file) for file in files), index_nbytes)
