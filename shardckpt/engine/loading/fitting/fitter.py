"""Does the checkpoint fit the state? All differences at once, each with a policy. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from shardckpt.engine.loading.fit import Fit, WantedTensor, WantedValue
from shardckpt.engine.loading.fitting.claims import claim, is_any_below
from shardckpt.engine.loading.fitting.differences import DROPPED, OF_OTHERS, Differences
from shardckpt.engine.loading.merging import check_mergeable, tensors_of_all
from shardckpt.engine.loading.optimizers import blank_tensors
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.selection import NOT_SELECTED, View
from shardckpt.engine.loading.selecting.whole import is_below, take_whole
from shardckpt.engine.loading.sources import BelongsToRankError, Sources
from shardckpt.engine.sharding import check_tensor, describe
from shardckpt.engine.splits.pieces import extent_of
from shardckpt.errors import InvalidStateError
from shardckpt.format.placement import Box
from shardckpt.format.tree import map_leaves
from shardckpt.state import Merge, NewWorld, Part, Path, is_extra_state, join_path

_Leaves: TypeAlias = dict[str, tuple[Path, object]]


def fit_state(parts: Sequence[Part], sources: Sources, policy: LoadPolicy, view: View) -> Fit:
    """Compare the state of this rank with the record; `sources` are those of the view."""
    fit = Fit(lenient=policy.missing == "keep", selection=view.selection)
    for part in parts:
        before = _count(fit)
        _Fitter(part, sources, policy, fit).run(view)
        if fit.trees.get(part.key) or _count(fit) > before:
            fit.taken.add(part.key)
    if policy.unexpected == "error":
        own = {part.key for part in parts}
        for top in dict.fromkeys(str(part.path[0]) for part in parts if len(part.path) > 1):
            saved = sources.under(top)
            fit.claims[top] = claim(saved, {name for name in saved if is_below(name, own)})
        fit.names += own
    return fit


def _count(fit: Fit) -> int:
    return len(fit.tensors) + len(fit.values) + len(fit.extra)


class _Fitter:
    """One part against the record."""

    def __init__(self, part: Part, sources: Sources, policy: LoadPolicy, fit: Fit) -> None:
        self._part, self._sources, self._policy, self._fit = part, sources, policy, fit
        self._differences = Differences(sources, policy, fit)
        own: NewWorld = getattr(part.owner, "new_world", "fail") if part.kind == "stateful" else "fail"
        self._rule: NewWorld = policy.new_world.get(str(part.path[0]), own)
        self._drops = self._rule == "drop" and not sources.is_same_job()
        self._merge: Merge | None = None
        if callable(self._rule):
            self._merge = None if sources.is_same_job() else self._rule
            self._rule = "fail"
        self._saved = sources.under(part.key)

    def run(self, view: View) -> None:
        leaves = _leaves_of(self._part)
        if self._part.kind in ("stateful", "optimizer") or self._merge is not None:
            problems, is_taken = take_whole(self._part, [*leaves, *self._saved], view)
            self._fit.problems += problems
            if not is_taken:
                self._differences.left(self._part.key, NOT_SELECTED)
                return
        chosen = {name: found for name, found in leaves.items() if view.selection.takes(name)}
        self._fit.left.update(dict.fromkeys(leaves.keys() - chosen.keys(), NOT_SELECTED))
        if not self._saved:
            if chosen:
                self._differences.missing(self._part.key)
        elif self._drops:
            self._fit.trees[self._part.key] = ()
            self._fit.claims[self._part.key] = claim(self._saved, self._saved)
            self._differences.left(self._part.key, DROPPED)
        elif self._merge is not None:
            self._take_of_all(self._merge)
        elif self._part.kind == "stateful":
            self._take_everything()
        else:
            self._compare(chosen, view)

    def _compare(self, leaves: _Leaves, view: View) -> None:
        """Key by key: modules, optimizers and leaves are what says which keys there are."""
        names = set(leaves)
        if self._part.kind == "module" and any(map(is_extra_state, names)):
            leaves = self._without_extra_state(leaves, view)
            names |= {name for name in self._saved if is_extra_state(name)}
        if self._part.kind == "optimizer":
            leaves, names = self._optimizer_leaves(leaves)
        for name, (path, leaf) in leaves.items():
            if isinstance(leaf, torch.Tensor):
                self._want_tensor(name, leaf)
            elif self._sources.value_home(name) is not None:
                if self._rank_of([name]) is not None:
                    self._fit.values.append(WantedValue(name, path, self._rule))
                else:
                    self._differences.left(name, OF_OTHERS)
            else:
                self._differences.missing(name, "is a tensor" if self._sources.tensor(name) else "")
        if self._policy.unexpected == "error":
            self._fit.claims[self._part.key] = claim(self._saved, names)
            self._fit.names += names

    def _without_extra_state(self, leaves: _Leaves, view: View) -> _Leaves:
        """What modules give by `get_extra_state` they get back as it was saved, whatever they have now."""
        below: dict[str, list[str]] = {}
        for own in (name for name in leaves if is_extra_state(name)):
            below.setdefault(own[: own.rindex("_extra_state") + len("_extra_state")], []).append(own)
        for name, names in below.items():
            self._take_extra_state(name, names, view)
        return {name: found for name, found in leaves.items() if not is_extra_state(name)}

    def _take_extra_state(self, name: str, own: Sequence[str], view: View) -> None:
        saved = self._sources.under(name)
        if not saved:
            self._differences.missing(name)
            return
        one = Part((*self._part.path, name[len(self._part.key) + 1 :]), "stateful", self._part.owner, None)
        problems, is_taken = take_whole(one, [*own, *saved], view)
        self._fit.problems += problems
        rank = self._rank_of(saved) if is_taken else None
        if rank is None:
            self._differences.left(name, OF_OTHERS)
            return
        self._fit.extra[name] = rank
        for entry, key in ((self._sources.tensor(key), key) for key in saved):
            if entry is not None:
                self._fit.anew[key] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
                self._want_tensor(key, self._fit.anew[key])

    def _optimizer_leaves(self, leaves: _Leaves) -> tuple[dict[str, Any], set[str]]:
        """The tensors that must fit, and all names that are expected.

        Hyperparameters are taken as they were saved, whatever there were. A parameter that had no state (before the
        first step, or because it was not used) is not asked for any; it will have none again.
        """
        prefix = f"{self._part.key}.state."
        try:
            ranks = self._fit.trees[self._part.key] = self._sources.optimizer_ranks(
                self._saved, self._rule, is_all=self._is_all
            )
            if not ranks:
                self._differences.left(self._part.key, OF_OTHERS)
        except BelongsToRankError as error:
            self._differences.problem(f"per rank: {error}")
        saved = sorted(name for name in self._saved if name.startswith(prefix))
        stateless = {name for name in self._part.tree["state"] if not is_any_below(f"{prefix}{name}.", saved)}
        self._fit.stateless[self._part.key] = stateless
        self._fit.anew |= (anew := blank_tensors(self._part, self._sources))
        empty = tuple(f"{prefix}{name}." for name in stateless)
        expected = {name for name in self._saved if not name.startswith(prefix)} | set(leaves) | set(anew)
        tensors = {name: found for name, found in leaves.items() if isinstance(found[1], torch.Tensor)}
        tensors = {name: found for name, found in tensors.items() if not name.startswith(empty)}
        tensors = {name: found for name, found in tensors.items() if name not in anew and name.startswith(prefix)}
        tensors |= {name: ((), tensor) for name, tensor in anew.items()}
        expected |= {name for name in self._saved if self._sources.value_home(name) is not None}
        return tensors, expected

    def _is_all(self, held: frozenset[str]) -> bool:
        """Whether a rank that held these keys had all parameters of the optimizer; ranks of experts have some."""
        prefix = f"{self._part.key}.state."
        known = {key.partition(".")[2] for key in held}
        known |= {key[len(prefix) :].rpartition(".")[0] for key in held if key.startswith(prefix)}
        return all(name in known for group in self._part.tree["param_groups"] for name in group["params"])

    def _rank_of(self, keys: Sequence[str]) -> int | None:
        """The rank whose values these are for this rank; None if there is none, or if the rule does not say."""
        alike = self._part.kind == "stateful"  # a pipeline stage has parameters of its own
        try:
            return self._sources.part_rank(keys, self._rule, alike=alike)
        except BelongsToRankError as error:
            self._differences.problem(f"per rank: {error}")
            return None

    def _take_everything(self) -> None:
        """An object with `load_state_dict` says itself what it understands: it gets what was saved, as it was."""
        rank = self._rank_of(self._saved)
        if rank is None:
            self._fit.trees[self._part.key] = ()
            self._differences.left(self._part.key, OF_OTHERS)
            return
        self._fit.trees[self._part.key] = (rank,)
        held = self._sources.held_by(rank)
        present: dict[str, torch.Tensor] = {}

        def note(path: Path, leaf: object) -> None:
            if isinstance(leaf, torch.Tensor) and describe(join_path(path), leaf) is not None:
                present[join_path(path)] = leaf

        map_leaves(self._part.tree, note, self._part.path)
        for name in (saved for saved in self._saved if saved in held):
            entry = self._sources.tensor(name, self._rule)
            if name in present:
                self._want_tensor(name, present[name])
            elif entry is not None:
                boxes = _whole(entry.shape)
                self._fit.tensors.append(WantedTensor(name, entry.dtype, entry.shape, boxes, None, self._rule))

    def _take_of_all(self, merge: Merge) -> None:
        """What every data-parallel rank held; who has no tensors of its own to fill is given new ones."""
        reason = check_mergeable(self._part, self._saved, self._sources)
        if reason:
            self._differences.problem(
                f"per rank: {reason}: functions are for objects with state_dict and for Python values"
            )
            return
        self._fit.trees[self._part.key] = self._sources.siblings()
        self._fit.merges[self._part.key] = merge
        for name, entry, rank in tensors_of_all(self._saved, self._sources):
            self._fit.tensors.append(WantedTensor(name, entry.dtype, entry.shape, _whole(entry.shape), None, rank))

    def _want_tensor(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._sources.tensor(name, self._rule)
        if entry is None:
            self._differences.missing(name, "is a Python value" if self._sources.value_home(name) else "")
            return
        if self._rank_of([name]) is None:
            self._differences.left(name, OF_OTHERS)
            return
        dtype, rule = check_tensor(name, tensor), (self._part.rules or {}).get(name)
        try:
            shape, boxes = extent_of(name, tensor, rule, self._sources.at)
        except InvalidStateError as error:
            self._differences.problem(f"split: {error}")
            return
        if shape != entry.shape:
            self._differences.shape(name, entry.shape, shape)
        elif dtype != entry.dtype and self._policy.dtype != "cast":
            self._differences.dtype(name, entry.dtype, dtype)
        else:
            local = getattr(tensor, "_local_tensor", tensor).detach()
            self._fit.tensors.append(WantedTensor(name, entry.dtype, shape, boxes, local, self._rule))


def _leaves_of(part: Part) -> _Leaves:
    if isinstance(part.tree, torch.Tensor):
        return {part.key: (part.path, part.tree)}
    leaves: _Leaves = {}
    map_leaves(part.tree, lambda path, leaf: leaves.update({join_path(path): (path, leaf)}), part.path)
    return leaves


def _whole(shape: tuple[int, ...]) -> tuple[Box, ...]:
    zeros = (0,) * len(shape)
    return (Box(zeros, shape, zeros),) if all(shape) else ()
