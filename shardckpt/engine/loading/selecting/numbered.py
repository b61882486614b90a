"""Optimizers whose state was saved by number, as `Optimizer.state_dict()` has it, and is loaded by it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.selection import Selection
from shardckpt.format.manifest import Manifest
from shardckpt.optimizers import OptimizerOf
from shardckpt.state import Part


def selection_of(policy: LoadPolicy, parts: Sequence[Part], manifest: Manifest) -> Selection:
    """That of the policy; with `by_number`, each optimizer whose parameters the checkpoint does not know by name has
    them by their numbers, which count all groups in their order, as `Optimizer.load_state_dict` does."""
    selection = policy.selection
    if policy.optimizers != "by_number":
        return selection
    saved = {name for table in manifest.tables for name in table.tensors}
    numbers: dict[str, str] = {}
    for part in (part for part in parts if isinstance(part.owner, OptimizerOf)):
        key, groups = selection.saved_name(part.key), part.owner.optimizer.param_groups
        own = [f"{part.key}.state.{part.owner.names[id(p)]}" for group in groups for p in group["params"]]
        if not _knows(saved, [selection.saved_name(name) for name in own]):
            numbers |= {name: f"{key}.state.{number}" for number, name in enumerate(own)}
    return Selection(policy.include, policy.exclude, policy.rename, numbers=numbers)


def _knows(saved: Collection[str], names: Sequence[str]) -> bool:
    """Whether there is state of any of these parameters."""
    known = set(names)
    return any(name.rpartition(".")[0] in known for name in saved)
