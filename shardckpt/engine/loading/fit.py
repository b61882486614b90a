"""Does the checkpoint fit the state? All differences at once, each with a policy. Pure."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.engine.loading.claims import by_part, claim, unclaimed
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.selection import NOT_SELECTED, Selection, View
from shardckpt.engine.loading.selecting.whole import is_below, take_whole
from shardckpt.engine.loading.sources import BelongsToRankError, Sources
from shardckpt.engine.sharding import check_tensor, describe
from shardckpt.errors import CheckpointMismatchError
from shardckpt.format.placement import Box
from shardckpt.format.tree import map_leaves
from shardckpt.state import NewWorld, Part, Path, join_path

OF_OTHERS = "of other ranks in the checkpoint"


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
    rule: NewWorld

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
    stateless: dict[str, set[str]] = field(default_factory=dict)
    """By optimizer: the parameters for which the checkpoint has no state."""
    problems: list[str] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)
    """By part: which of its saved keys this rank has a place for (see `claims`)."""
    names: list[str] = field(default_factory=list)
    """All keys of this rank's state."""
    taken: set[str] = field(default_factory=set)
    """The parts of which anything is taken."""
    left: dict[str, str] = field(default_factory=dict)
    """Keys of the state, or of whole parts of it, that stay as they are -> why."""
    selection: Selection = field(default_factory=Selection)


def fit_state(parts: Sequence[Part], sources: Sources, policy: LoadPolicy, view: View) -> Fit:
    """Compare the state of this rank with the record; `sources` are those of the view."""
    fit = Fit(selection=view.selection)
    for part in parts:
        before = len(fit.tensors) + len(fit.values)
        _Fitter(part, sources, policy, fit).run(view)
        if fit.trees.get(part.key) or len(fit.tensors) + len(fit.values) > before:
            fit.taken.add(part.key)
    if policy.unexpected == "error":
        own = {part.key for part in parts}
        for top in dict.fromkeys(str(part.path[0]) for part in parts if len(part.path) > 1):
            saved = sources.under(top)
            fit.claims[top] = claim(saved, {name for name in saved if is_below(name, own)})
        fit.names += own
    return fit


def unexpected_keys(sources: Sources, fit: Fit, claims: Sequence[Mapping[str, str]]) -> list[str]:
    """What the checkpoint has below the parts that are loaded, and no rank has a place for. On rank 0."""
    claimed, selection = by_part(claims), fit.selection
    left = {name: None for part, those in claimed.items() for name in unclaimed(sources.under(part), those)}

    def is_known(name: str) -> bool:
        """Whether it is loaded, or was left out, by another name."""
        others = selection.own_names(selection.saved_name(name)) if selection.renames else ()
        return any(not selection.takes(other) or (other not in left and is_below(other, claimed)) for other in others)

    once = {selection.saved_name(name): name for name in reversed(left)}
    return [
        f"unexpected: {selection.called(name)} is in the checkpoint but not in the state{_near(name, fit.names)}"
        for name in left
        if once[selection.saved_name(name)] == name and not is_known(name)
    ]


def mismatch_error(problems: Iterable[str], step: int) -> CheckpointMismatchError:
    """One error for all differences of all ranks."""
    every = list(dict.fromkeys(problems))
    shown = "".join(f"\n  - {problem}" for problem in every[:50])
    more = f"\n  ... and {len(every) - 50} more" if len(every) > 50 else ""
    return CheckpointMismatchError(
        f"checkpoint of step {step} does not fit the state, and nothing was loaded; {len(every)} differences:"
        f"{shown}{more}\nChange the state, or allow a kind of difference with LoadPolicy(...).",
        problems=every,
        step=step,
    )


class _Fitter:
    """One part against the record."""

    def __init__(self, part: Part, sources: Sources, policy: LoadPolicy, fit: Fit) -> None:
        self._part, self._sources, self._policy, self._fit = part, sources, policy, fit
        own: NewWorld = getattr(part.owner, "new_world", "fail") if part.kind == "stateful" else "fail"
        self._rule: NewWorld = policy.new_world.get(str(part.path[0]), own)
        self._saved = sources.under(part.key)
        self._selection = fit.selection

    def run(self, view: View) -> None:
        leaves: dict[str, tuple[Path, object]] = {}
        map_leaves(self._part.tree, lambda path, leaf: leaves.update({join_path(path): (path, leaf)}), self._part.path)
        chosen = {name: found for name, found in leaves.items() if self._selection.takes(name)}
        if self._part.kind in ("stateful", "optimizer"):
            problems, is_taken = take_whole(self._part, [*leaves, *self._saved], view)
            self._fit.problems += problems
            if not is_taken:
                self._fit.left[self._part.key] = NOT_SELECTED
                return
        self._fit.left.update(dict.fromkeys(leaves.keys() - chosen.keys(), NOT_SELECTED))
        if not self._saved:
            if chosen:
                self._missing(self._part.key)
        elif self._part.kind == "stateful":
            self._take_everything()
        else:
            self._compare(chosen)

    def _compare(self, leaves: dict[str, tuple[Path, object]]) -> None:
        """Key by key: modules, optimizers and leaves are what says which keys there are."""
        names = set(leaves)
        if self._part.kind == "optimizer":
            leaves, names = self._optimizer_leaves(leaves)
        for name, (path, leaf) in leaves.items():
            if isinstance(leaf, torch.Tensor):
                self._want_tensor(name, leaf)
            elif self._sources.value_home(name) is not None:
                if self._rank_of([name]) is not None:
                    self._fit.values.append(WantedValue(name, path, self._rule))
                else:
                    self._fit.left[name] = OF_OTHERS
            else:
                self._missing(name, "is a tensor" if self._sources.tensor(name) else "")
        if self._policy.unexpected == "error":
            self._fit.claims[self._part.key] = claim(self._saved, names)
            self._fit.names += names

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
        stateless = {name for name in self._part.tree["state"] if not _is_any_below(f"{prefix}{name}.", saved)}
        self._fit.stateless[self._part.key] = stateless
        empty = tuple(f"{prefix}{name}." for name in stateless)
        expected = {name for name in self._saved if not name.startswith(prefix)} | set(leaves)
        tensors = {name: found for name, found in leaves.items() if isinstance(found[1], torch.Tensor)}
        tensors = {name: found for name, found in tensors.items() if not name.startswith(empty)}
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
            self._fit.left[self._part.key] = OF_OTHERS
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

    def _want_tensor(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._sources.tensor(name, self._rule)
        if entry is None:
            self._missing(name, "is a Python value" if self._sources.value_home(name) else "")
            return
        if self._rank_of([name]) is None:
            self._fit.left[name] = OF_OTHERS
            return
        dtype, shape = check_tensor(name, tensor), tuple(tensor.shape)
        if shape != entry.shape:
            self._differs("shape", name, list(entry.shape), list(shape), keep=self._policy.shape == "keep")
            return
        if dtype != entry.dtype and self._policy.dtype != "cast":
            self._differs("dtype", name, entry.dtype, dtype, keep=self._policy.dtype == "keep")
            return
        sharding = describe(name, tensor)
        boxes = sharding.boxes(shape) if sharding else _whole(shape)
        local = getattr(tensor, "_local_tensor", tensor).detach()
        self._fit.tensors.append(WantedTensor(name, entry.dtype, shape, boxes, local, self._rule))

    def _differs(self, kind: str, name: str, saved: object, own: object, *, keep: bool) -> None:
        if keep:
            self._fit.left[name] = f"of another {kind} in the checkpoint"
        else:
            self._problem(f"{kind}: {self._selection.called(name)} is {saved} in the checkpoint, {own} in the state")

    def _missing(self, name: str, instead: str = "") -> None:
        if instead:
            self._problem(f"kind: {self._selection.called(name)} {instead} in the checkpoint, but not in the state")
        elif self._policy.missing == "keep":
            self._fit.left[name] = "not in the checkpoint"
        else:
            saved = self._selection.saved_name(name)
            near = _near(saved, map(self._selection.saved_name, self._sources.names()))
            other = "" if saved == name else f" (as {saved})"
            self._problem(f"missing: {name} is in the state but not in the checkpoint{other}{near}")

    def _problem(self, text: str) -> None:
        self._fit.problems.append(text)


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as a hint. Only names of the same depth are looked at, and not more than 2,000."""
    depth = name.count(".")
    candidates = [other for other in known if other.count(".") == depth][:2000]
    close = difflib.get_close_matches(name, candidates, n=1)
    return f" (nearest: {close[0]})" if close else ""


def _is_any_below(prefix: str, ordered: Sequence[str]) -> bool:
    """Whether any of the names, which are in order, begins so."""
    place = bisect.bisect_left(ordered, prefix)
    return place < len(ordered) and ordered[place].startswith(prefix)


def _whole(shape: tuple[int, ...]) -> tuple[Box, ...]:
    zeros = (0,) * len(shape)
    return (Box(zeros, shape, zeros),) if all(shape) else ()
