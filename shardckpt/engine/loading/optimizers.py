"""Give an optimizer back what it held: its groups, and the state of its parameters that is not tensors.

Everything goes by the names of parameters. Tensors are loaded in place, like those of modules.

2026-11: not `set_optimizer_state_dict`: it ends in `Optimizer.load_state_dict`, which casts a float32 moment of a
bfloat16 parameter to bfloat16 without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.errors import InvalidStateError
from shardckpt.state import OptimizerOf, Part

Options = Mapping[str, Any]
"""A group's hyperparameters: all that it holds but its parameters."""


@dataclass(slots=True)
class SavedOptimizer:
    """What the trees of the ranks that saved say of an optimizer."""

    options: dict[str, Options] = field(default_factory=dict)
    """By parameter: those of its group."""
    at: list[Options] = field(default_factory=list)
    """By position: those of every group."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By parameter: its state that is not tensors."""


def read_saved(trees: Iterable[Any]) -> SavedOptimizer:
    """The trees together; each rank has groups of the parameters that it held. Where several have one, the first's."""
    saved = SavedOptimizer()
    for tree in trees:
        groups = (tree or {}).get("param_groups", [])
        for group in groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for name in group["params"]:
                saved.options.setdefault(name, options)
        for group in groups[len(saved.at) :]:
            saved.at.append({key: value for key, value in group.items() if key != "params"})
        for name, values in (tree or {}).get("state", {}).items():
            plain = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
            saved.values.setdefault(name, plain)
    return saved


def renamed(saved: SavedOptimizer, names: Mapping[str, str]) -> SavedOptimizer:
    """By the names that the state has for the parameters; `names` are what the checkpoint calls them."""
    options = {own: saved.options[name] for own, name in names.items() if name in saved.options}
    values = {own: saved.values[name] for own, name in names.items() if name in saved.values}
    return SavedOptimizer(options, saved.at, values)


def match_groups(part: Part, saved: SavedOptimizer) -> list[Options]:
    """For every group of the optimizer its saved options; changes nothing.

    `InvalidStateError` for a parameter that was in no group, and for a group of parameters whose options differ.
    """
    matched = []
    for number, names in enumerate(_names_by_group(part.owner)):
        unknown = [name for name in names if name not in saved.options]
        if unknown or (not names and number >= len(saved.at)):
            what = f"the parameters {', '.join(unknown[:3])}" if unknown else f"group {number}, which is empty"
            raise InvalidStateError(
                f"the checkpoint has no group of {part.key} with {what}: group the parameters as they were when it "
                "was saved"
            )
        options = saved.options[names[0]] if names else saved.at[number]
        other = next((name for name in names if saved.options[name] != options), None)
        if other is not None:
            raise InvalidStateError(
                f"group {number} of {part.key} has parameters of groups with different options, such as {names[0]} "
                f"and {other}: group the parameters as they were when it was saved"
            )
        matched.append(options)
    return matched


def restore_optimizer(part: Part, saved: SavedOptimizer, stateless: Collection[str]) -> None:
    """Groups, and the state that is not tensors; parameters that are `stateless` in the checkpoint become so here.

    Called on the caller's thread of every rank, after the tensors are in place.
    """
    owner: OptimizerOf = part.owner
    state = owner.optimizer.state
    for group, names, options in zip(
        owner.optimizer.param_groups, _names_by_group(owner), match_groups(part, saved), strict=True
    ):
        group.update(options)
        for name, parameter in zip(names, group["params"], strict=True):
            if name in stateless:
                state.pop(parameter, None)
            elif saved.values.get(name):
                state[parameter].update(saved.values[name])


def forget_made_up_state(parts: Sequence[Part]) -> None:
    """Optimizers that had no state, were given some to load into, and were not loaded, have none again."""
    for part in parts:
        if isinstance(part.owner, OptimizerOf) and part.owner.was_empty:
            part.owner.optimizer.state.clear()


def _names_by_group(owner: OptimizerOf) -> list[list[str]]:
    return [[owner.names[id(parameter)] for parameter in group["params"]] for group in owner.optimizer.param_groups]
