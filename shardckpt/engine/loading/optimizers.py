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

from shardckpt.engine.loading.sources import Sources
from shardckpt.errors import InvalidStateError
from shardckpt.optimizers import OptimizerOf
from shardckpt.state import Part

Options = Mapping[str, Any]
"""A group's hyperparameters: all that it holds but its parameters."""


@dataclass(slots=True)
class SavedOptimizer:
    """What the trees of the ranks that saved say of an optimizer."""

    lenient: bool = False
    """Groups of parameters that were in none stay as they are."""
    options: dict[str, Options] = field(default_factory=dict)
    """By parameter: those of its group."""
    at: list[Options] = field(default_factory=list)
    """By position: those of every group."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By parameter: its state, but for tensors that are loaded in place."""


def read_saved(trees: Iterable[Any], *, lenient: bool = False) -> SavedOptimizer:
    """The trees together; each rank has groups of the parameters that it held. Where several have one, the first's."""
    saved = SavedOptimizer(lenient)
    for tree in trees:
        groups = (tree or {}).get("param_groups", [])
        for group in groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for name in group["params"]:
                saved.options.setdefault(name, options)
        for group in groups[len(saved.at) :]:
            saved.at.append({key: value for key, value in group.items() if key != "params"})
        for name, values in (tree or {}).get("state", {}).items():
            plain = {key: value for key, value in values.items() if not is_elsewhere(value)}
            saved.values.setdefault(name, plain)
    return saved


def by_own_names(tree: Any, names: Mapping[str, str]) -> Any:
    """The tree of a rank by the names that the state has for the parameters; `names` are what the checkpoint calls
    them (numbers, too), of which one may be that of several."""
    own: dict[str, list[str]] = {}
    for name, saved in names.items():
        own.setdefault(saved, []).append(name)
    state = {name: values for saved, values in tree.get("state", {}).items() for name in own.get(str(saved), ())}
    groups = [
        {**group, "params": [name for saved in group["params"] for name in own.get(str(saved), ())]}
        for group in tree.get("param_groups", [])
    ]
    return {**tree, "state": state, "param_groups": groups}


def is_by_number(tree: Any) -> bool:
    """Whether the tree of an optimizer knows parameters by their numbers."""
    return any(type(name) is int for group in tree.get("param_groups", []) for name in group["params"])


def is_elsewhere(value: Any) -> bool:
    """Whether it only stands for a tensor, as trees have it, which is loaded into the tensor that is there."""
    return isinstance(value, torch.Tensor) and value.is_meta


def blank_tensors(part: Part, sources: Sources) -> dict[str, torch.Tensor]:
    """New tensors, by name, for what the checkpoint has of an optimizer where that has none to load into.

    Those are hyperparameters (a learning rate for compiled steps), whose groups may stand elsewhere, and the state of
    a parameter that has none, or has lists, which may be of any length (LBFGS).
    """
    owner: OptimizerOf = part.owner
    own = part.tree["state"]
    parameters = {owner.names[id(p)]: p for group in owner.holder.param_groups for p in group["params"]}
    anew = {name: p for name, p in parameters.items() if not _is_flat(own.get(name))}
    places = {f"{part.key}.state.{name}": parameter for name, parameter in anew.items()}
    places[f"{part.key}.param_groups"] = torch.empty(0)
    made = {}
    for place, parameter in places.items():
        for name in sources.under(place):
            entry = sources.tensor(name)
            if entry is not None and not (part.rules and sources.is_sharded(name)):  # of which part is not known
                made[name] = _blank(parameter, entry.shape, getattr(torch, entry.dtype))
    return made


def _is_flat(values: Mapping[str, Any] | None) -> bool:
    return bool(values) and not any(isinstance(value, list) for value in (values or {}).values())


def _blank(parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the parameter's device, and sharded like it, unless it is a number, which optimizers keep on the host."""
    if tuple(parameter.shape) == shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else "cpu")


def match_groups(part: Part, saved: SavedOptimizer) -> list[Options | None]:
    """For every group of the optimizer its saved options, None if it is to stay as it is; changes nothing.

    `InvalidStateError` for a parameter that was in no group, and for a group of parameters whose options differ.
    """
    matched: list[Options | None] = []
    for number, names in enumerate(_names_by_group(part.owner)):
        unknown = [name for name in names if name not in saved.options]
        if saved.lenient and (len(unknown) == len(names) or not names):
            matched.append(None if names or number >= len(saved.at) else saved.at[number])
            continue
        if unknown or (not names and number >= len(saved.at)):
            what = f"the parameters {', '.join(unknown[:3])}" if unknown else f"group {number}, which is empty"
            raise InvalidStateError(
                f"the checkpoint has no group of {part.key} with {what}: group the parameters as they were when it "
                "was saved"
            )
        options = saved.options[names[0]] if names else saved.at[number]
        other = next((name for name in names if _values(saved.options[name]) != _values(options)), None)
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
    state = owner.holder.state
    own = {id(parameter) for group in owner.holder.param_groups for parameter in group["params"]}
    for group, names, options in zip(
        owner.optimizer.param_groups, _names_by_group(owner), match_groups(part, saved), strict=True
    ):
        if options is None:
            continue
        group.update({key: _in_place(group.get(key), value) for key, value in options.items()})
        for name, parameter in zip(names, group["params"], strict=True):
            if name in stateless:
                state.pop(parameter, None)
            elif saved.values.get(name) and id(parameter) in own:
                state[parameter].update(saved.values[name])
            if parameter in state:
                _place_step(group, state[parameter], parameter.device)


def _place_step(group: Options, values: dict[str, Any], device: torch.device) -> None:
    """What runs on the device (capturable, fused) counts its steps there, as `Optimizer.load_state_dict` has it; the
    options are those that were saved, and may say so of an optimizer that was made to count on the host."""
    step = values.get("step")
    if isinstance(step, torch.Tensor) and (group.get("capturable") or group.get("fused")) and step.device != device:
        values["step"] = step.to(device)


def _values(options: Options) -> Options:
    return {key: value for key, value in options.items() if not isinstance(value, torch.Tensor)}


def _in_place(now: Any, value: Any) -> Any:
    """A tensor that a compiled or captured step knows stays that tensor."""
    if not (isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor) and now.shape == value.shape):
        return value
    with torch.no_grad():
        return now.copy_(value)


def forget_made_up_state(parts: Sequence[Part]) -> None:
    """Optimizers that had no state, were given some to load into, and were not loaded, have none again."""
    for part in parts:
        if isinstance(part.owner, OptimizerOf) and part.owner.was_empty:
            part.owner.holder.state.clear()


def _names_by_group(owner: OptimizerOf) -> list[list[str]]:
    return [[owner.names[id(parameter)] for parameter in group["params"]] for group in owner.optimizer.param_groups]
