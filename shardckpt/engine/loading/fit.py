"""Does the checkpoint fit the state? All differences at once, each with a policy. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.engine.loading.claims import claim, is_any_below, nearest
from shardckpt.engine.loading.merging import check_mergeable, tensors_of_all
from shardckpt.engine.loading.optimizers import blank_tensors
from shardckpt.engine.loading.sources import BelongsToRankError, Sources, Whose
from shardckpt.engine.loading.terms.policy import LoadPolicy as LoadPolicy
from shardckpt.engine.sharding import check_tensor, describe
from shardckpt.engine.splits.pieces import extent_of
from shardckpt.errors import InvalidStateError
from shardckpt.format.placement import Box
from shardckpt.format.tree import map_leaves
from shardckpt.state import Merge, NewWorld, Part, Path, is_extra_state, join_path


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor of the state that is to be filled: `local` is this rank's part of it, made of `boxes` of the whole.

    `local` is None where the state has no tensor to fill: a whole one is made, of the checkpoint's dtype and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    local: torch.Tensor | None
    rule: Whose

    @property
    def key(self) -> tuple[str, int | None]:
        """What no other wanted tensor has."""
        return self.name, self.rank

    @property
    def rank(self) -> int | None:
        """Whose it is, if that of each of several ranks is wanted."""
        return self.rule if isinstance(self.rule, int) else None

    @property
    def is_whole(self) -> bool:
        """Whether this rank wants all of it."""
        return any(box.lengths == self.shape for box in self.boxes)


@dataclass(frozen=True, slots=True)
class WantedValue:
    """A Python value of the state that is to be taken from the checkpoint."""

    key: str
    path: Path
    rule: NewWorld


@dataclass(slots=True)
class Fit:
    """What this rank will load, and every reason why it should not."""

    tensors: list[WantedTensor] = field(default_factory=list)
    values: list[WantedValue] = field(default_factory=list)
    trees: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By part: the ranks (of those that saved) whose nested values it takes; none: the part is left as it is."""
    merges: dict[str, Merge] = field(default_factory=dict)
    """By part: what makes of the values of the ranks in `trees` those of this rank."""
    stateless: dict[str, set[str]] = field(default_factory=dict)
    """By optimizer: the parameters for which the checkpoint has no state."""
    anew: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of optimizers that had none to load into."""
    lenient: bool = False
    """What the checkpoint lacks is to be kept."""
    problems: list[str] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)
    """By part: which of its saved keys this rank has a place for (see `claims`)."""
    names: list[str] = field(default_factory=list)
    """All keys of this rank's state."""

    def with_new(self, tree: Any, path: Path) -> Any:
        """A saved tree with the tensors of `anew` in it."""
        return map_leaves(tree, lambda path, leaf: self.anew.get(join_path(path), leaf), path)


def fit_state(parts: Sequence[Part], sources: Sources, policy: LoadPolicy) -> Fit:
    """Compare the state of this rank with the record."""
    fit = Fit(lenient=policy.missing == "keep")
    for part in parts:
        _Fitter(part, sources, policy, fit).run()
    if policy.unexpected == "error":
        own = {part.key for part in parts}
        for top in dict.fromkeys(str(part.path[0]) for part in parts if len(part.path) > 1):
            saved = sources.under(top)
            fit.claims[top] = claim(saved, {name for name in saved if _belongs_to_part(name, own)})
        fit.names += own
    return fit


class _Fitter:
    """One part against the record."""

    def __init__(self, part: Part, sources: Sources, policy: LoadPolicy, fit: Fit) -> None:
        self._part, self._sources, self._policy, self._fit = part, sources, policy, fit
        own: NewWorld = getattr(part.owner, "new_world", "fail") if part.kind == "stateful" else "fail"
        self._rule: NewWorld = policy.new_world.get(str(part.path[0]), own)
        self._drops = self._rule == "drop" and not sources.is_same_job()
        self._merge: Merge | None = None
        if callable(self._rule):
            self._merge = None if sources.is_same_job() else self._rule
            self._rule = "fail"
        self._saved = sources.under(part.key)

    def run(self) -> None:
        if not self._saved:
            self._missing(self._part.key)
        elif self._drops:
            self._fit.trees[self._part.key] = ()
            self._fit.claims[self._part.key] = claim(self._saved, self._saved)
        elif self._merge is not None:
            self._take_of_all(self._merge)
        elif self._part.kind == "stateful":
            self._take_everything()
        else:
            self._compare()

    def _compare(self) -> None:
        """Key by key: modules, optimizers and leaves are what says which keys there are."""
        leaves: dict[str, tuple[Path, object]] = {}
        map_leaves(self._part.tree, lambda path, leaf: leaves.update({join_path(path): (path, leaf)}), self._part.path)
        names = set(leaves)
        if self._part.kind == "module" and any(map(is_extra_state, names)):
            leaves = self._without_extra_state(leaves)
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
                self._missing(name, "is a tensor" if self._sources.tensor(name) else "")
        if self._policy.unexpected == "error":
            self._fit.claims[self._part.key] = claim(self._saved, names)
            self._fit.names += names

    def _without_extra_state(self, leaves: dict[str, tuple[Path, object]]) -> dict[str, tuple[Path, object]]:
        """What modules give by `get_extra_state` they get back as it was saved, whatever they have now."""
        for own in dict.fromkeys(name for name in leaves if is_extra_state(name)):
            name = own[: own.rindex("_extra_state") + len("_extra_state")]
            saved = self._sources.under(name)
            rank = self._rank_of(saved) if saved else None
            if rank is None:
                if not saved:
                    self._missing(name)
                continue
            self._fit.trees[self._part.key] = tuple(dict.fromkeys((*self._fit.trees.get(self._part.key, ()), rank)))
            for entry, key in ((self._sources.tensor(key), key) for key in saved):
                if entry is not None and key not in self._fit.anew:
                    self._fit.anew[key] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
                    self._want_tensor(key, self._fit.anew[key])
        return {name: found for name, found in leaves.items() if not is_extra_state(name)}

    def _optimizer_leaves(self, leaves: dict[str, tuple[Path, object]]) -> tuple[dict[str, Any], set[str]]:
        """The tensors that must fit, and all names that are expected.

        Hyperparameters are taken as they were saved, whatever there were. A parameter that had no state (before the
        first step, or because it was not used) is not asked for any; it will have none again.
        """
        prefix = f"{self._part.key}.state."
        try:
            self._fit.trees[self._part.key] = self._sources.optimizer_ranks(self._saved, self._rule)
        except BelongsToRankError as error:
            self._problem(f"per rank: {error}")
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

    def _rank_of(self, keys: Sequence[str]) -> int | None:
        """The rank whose values these are for this rank; None if there is none, or if the rule does not say."""
        alike = self._part.kind == "stateful"  # a pipeline stage has parameters of its own
        try:
            return self._sources.part_rank(keys, self._rule, alike=alike)
        except BelongsToRankError as error:
            self._problem(f"per rank: {error}")
            return None

    def _take_everything(self) -> None:
        """An object with `load_state_dict` says itself what it understands: it gets what was saved, as it was."""
        rank = self._rank_of(self._saved)
        if rank is None:
            self._fit.trees[self._part.key] = ()
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
            self._problem(f"per rank: {reason}: functions are for objects with state_dict and for Python values")
            return
        self._fit.trees[self._part.key] = self._sources.siblings()
        self._fit.merges[self._part.key] = merge
        for name, entry, rank in tensors_of_all(self._saved, self._sources):
            self._fit.tensors.append(WantedTensor(name, entry.dtype, entry.shape, _whole(entry.shape), None, rank))

    def _want_tensor(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._sources.tensor(name, self._rule)
        if entry is None:
            self._missing(name, "is a Python value" if self._sources.value_home(name) else "")
            return
        if self._rank_of([name]) is None:
            return
        dtype, rule = check_tensor(name, tensor), (self._part.rules or {}).get(name)
        try:
            shape, boxes = extent_of(name, tensor, rule, self._sources.at)
        except InvalidStateError as error:
            self._problem(f"split: {error}")
            return
        if shape != entry.shape:
            if self._policy.shape == "error":
                self._problem(f"shape: {name} is {list(entry.shape)} in the checkpoint, {list(shape)} in the state")
            return
        if dtype != entry.dtype and self._policy.dtype != "cast":
            if self._policy.dtype == "error":
                self._problem(f"dtype: {name} is {entry.dtype} in the checkpoint, {dtype} in the state")
            return
        local = getattr(tensor, "_local_tensor", tensor).detach()
        self._fit.tensors.append(WantedTensor(name, entry.dtype, shape, boxes, local, self._rule))

    def _missing(self, name: str, instead: str = "") -> None:
        if instead:
            self._problem(f"kind: {name} {instead} in the checkpoint, but not in the state")
        elif self._policy.missing == "error":
            near = nearest(name, self._sources.names())
            self._problem(f"missing: {name} is in the state but not in the checkpoint{near}")

    def _problem(self, text: str) -> None:
        self._fit.problems.append(text)


def _belongs_to_part(name: str, parts: Collection[str]) -> bool:
    """Whether the key is that of a part, or below one."""
    pieces = name.split(".")
    return any(".".join(pieces[: i + 1]) in parts for i in range(len(pieces)))


def _whole(shape: tuple[int, ...]) -> tuple[Box, ...]:
    zeros = (0,) * len(shape)
    return (Box(zeros, shape, zeros),) if all(shape) else ()
