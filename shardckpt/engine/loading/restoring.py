"""Give the parts of a state what was loaded for them, once all tensors that they have are filled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.merging import Made, merged
from shardckpt.engine.loading.needs import loaded_values
from shardckpt.engine.loading.optimizers import (
    SavedOptimizer,
    by_own_names,
    forget_made_up_state,
    is_by_number,
    match_groups,
    read_saved,
    restore_optimizer,
)
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.tree import map_leaves
from shardckpt.state import Part, Path, join_path, restore
from shardckpt.streams import RngState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restorer:
    """Of one load, on the caller's thread of each rank."""

    fit: Fit
    sources: Sources
    contents: Contents

    def match_groups(self, parts: Sequence[Part]) -> None:
        """Errors of optimizers whose groups do not fit, before anything changes."""
        for part in parts:
            if part.kind == "optimizer" and self.fit.trees.get(part.key):
                match_groups(part, self._saved_optimizer(part))

    def merged(self, parts: Sequence[Part], made: Made) -> dict[str, Any]:
        """By part, what functions make of the values of all ranks; nothing of the state changes."""
        return merged(parts, self.fit, self._subtree, self.sources.place, made)

    def restore(self, parts: Sequence[Part], made: Made, merged: Mapping[str, Any]) -> None:
        """All parts of which anything is loaded, random streams last. `made` has tensors that no part has yet."""
        values = loaded_values(self.fit, self.sources, self.contents)
        for part in sorted(parts, key=lambda part: isinstance(part.owner, RngState)):
            if self.fit.trees.get(part.key) == ():
                _log.warning("%s keeps what it has: %s", part.key, self.fit.left.get(part.key))
            if part.key in merged:
                restore(part, merged[part.key])
            elif part.key in self.fit.taken:
                self._restore(part, values, made)
        forget_made_up_state([part for part in parts if not self.fit.trees.get(part.key)])

    def _restore(self, part: Part, values: Mapping[str, Any], made: Made) -> None:
        if part.kind == "module":
            restore(part, self._extra_states(part) | self._plain_values(part, values))
        elif part.kind == "leaf":
            restore(part, map_leaves(part.tree, lambda path, leaf: values.get(join_path(path), leaf), part.path))
        elif part.kind == "optimizer":
            if self.fit.trees.get(part.key):
                restore_optimizer(part, self._saved_optimizer(part), self.fit.stateless[part.key])
        else:
            held = {wanted.name: wanted.local for wanted in self.fit.tensors if wanted.local is not None}
            tensors = held | {name: tensor for (name, rank), tensor in made.items() if rank is None}
            tree = self._subtree(part, self.fit.trees[part.key][0])
            restore(part, map_leaves(tree, lambda path, leaf: _leaf(join_path(path), leaf, tensors), part.path))

    def _extra_states(self, part: Part) -> dict[str, Any]:
        """What was saved of them; one that is not loaded is not set anew either."""
        loaded: dict[str, Any] = {}
        for name, rank in self.fit.extra.items():
            key = name.removeprefix(f"{part.key}.")
            if name != key and key in part.tree:
                path = (*part.path, key)
                loaded[key] = self.fit.with_new(self._saved(path, rank), path)
        return loaded

    def _plain_values(self, part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
        """Python values that a module has besides, of which any is loaded."""
        depth = len(part.path)
        own = {value.path[depth] for value in self.fit.values if value.path[:depth] == part.path}
        tree = {key: value for key, value in part.tree.items() if key in own}
        return dict(map_leaves(tree, lambda path, leaf: values.get(join_path(path), leaf), part.path))

    def _saved_optimizer(self, part: Part) -> SavedOptimizer:
        trees = [self._optimizer_tree(part, rank) for rank in self.fit.trees[part.key]]
        return read_saved((self.fit.with_new(tree, part.path) for tree in trees), lenient=self.fit.lenient)

    def _optimizer_tree(self, part: Part, rank: int) -> Any:
        tree, selection = self._subtree(part, rank), self.fit.selection
        if tree is None or not selection.renames:
            return tree
        above = f"{selection.saved_name(part.key)}.state."
        call = selection.saved_name if is_by_number(tree) else selection.renamed
        called = {name: call(f"{part.key}.state.{name}") for name in part.owner.names.values()}
        return by_own_names(tree, {name: saved.removeprefix(above) for name, saved in called.items()})

    def _subtree(self, part: Part, rank: int) -> Any:
        """What that rank (of those that saved) had for the part."""
        return self._saved(part.path, rank)

    def _saved(self, path: Path, rank: int) -> Any:
        """What that rank (of those that saved) had for what is at this path of the state."""
        files, key = self.sources.trees_of(rank), join_path(path)
        saved = self.fit.selection.saved_name(key)
        return self.contents.subtree(files, path if saved == key else self.contents.path_of(files, saved))


def _leaf(name: str, leaf: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    return tensors.get(name, leaf) if isinstance(leaf, torch.Tensor) else leaf
