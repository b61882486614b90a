"""Give the parts of a state what was loaded for them, once all tensors that they have are filled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.optimizers import (
    SavedOptimizer,
    forget_made_up_state,
    match_groups,
    read_saved,
    renamed,
    restore_optimizer,
)
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.tree import map_leaves
from shardckpt.state import Part, Path, RngState, join_path, restore

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

    def restore(self, parts: Sequence[Part], made: Mapping[str, torch.Tensor]) -> None:
        """All parts of which anything is loaded, random streams last. `made` has tensors that no part has yet."""
        values = self._loaded_values()
        for part in sorted(parts, key=lambda part: isinstance(part.owner, RngState)):
            if self.fit.trees.get(part.key) == ():
                _log.warning("%s was saved by other ranks; this one keeps what it has", part.key)
            if part.key in self.fit.taken:
                self._restore(part, values, made)
        forget_made_up_state([part for part in parts if part.key not in self.fit.trees])

    def _loaded_values(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for value in self.fit.values:
            rank = self.sources.part_rank([value.key], value.rule)
            if rank is not None:
                leaves = self.contents.leaves(self.sources.trees_of(rank))
                values[value.key] = leaves[self.fit.selection.saved_name(value.key)][1]
        return values

    def _restore(self, part: Part, values: Mapping[str, Any], made: Mapping[str, torch.Tensor]) -> None:
        if part.kind in ("module", "leaf"):
            loaded = map_leaves(part.tree, lambda path, leaf: values.get(join_path(path), leaf), part.path)
            if part.kind == "module":  # an extra state that is not loaded is not set anew either
                depth = len(part.path)
                own = {value.path[depth] for value in self.fit.values if value.path[:depth] == part.path}
                loaded = {key: value for key, value in loaded.items() if key in own}
            restore(part, loaded)
        elif part.kind == "optimizer":
            restore_optimizer(part, self._saved_optimizer(part), self.fit.stateless[part.key])
        else:
            held = {wanted.name: wanted.local for wanted in self.fit.tensors if wanted.local is not None}
            tensors = {**held, **made}
            tree = self._subtree(part, self.fit.trees[part.key][0])
            restore(part, map_leaves(tree, lambda path, leaf: _leaf(join_path(path), leaf, tensors), part.path))

    def _saved_optimizer(self, part: Part) -> SavedOptimizer:
        saved = read_saved(self._subtree(part, rank) for rank in self.fit.trees[part.key])
        if not self.fit.selection.renames:
            return saved
        above = f"{self.fit.selection.saved_name(part.key)}.state."
        names = part.owner.names.values()
        called = {name: self.fit.selection.saved_name(f"{part.key}.state.{name}") for name in names}
        return renamed(saved, {name: saved_name.removeprefix(above) for name, saved_name in called.items()})

    def _subtree(self, part: Part, rank: int) -> Any:
        """What that rank (of those that saved) had for the part."""
        files = self.sources.trees_of(rank)
        return self.contents.subtree(files, self._path(part, files))

    def _path(self, part: Part, files: Sequence[str]) -> Path:
        saved = self.fit.selection.saved_name(part.key)
        return part.path if saved == part.key else self.contents.path_of(files, saved)


def _leaf(name: str, leaf: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    return tensors.get(name, leaf) if isinstance(leaf, torch.Tensor) else leaf
