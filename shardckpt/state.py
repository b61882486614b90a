"""What a state is here: a dict of live objects, tensors and values, taken apart into parts and put together again.

A part is a module, an optimizer, any object with `state_dict`/`load_state_dict`, or a plain leaf. Names of model
and optimizer state are those of `torch.distributed.checkpoint.state_dict` (no "module." of DDP, no "_orig_mod." of
`torch.compile`; optimizer state by parameter name), so that they do not depend on how the model is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch.distributed.checkpoint import state_dict as torch_state

from shardckpt.errors import InvalidStateError
from shardckpt.optimizers import OptimizerOf, all_own, holder_of, make_state, optimizer_tree, owner_of
from shardckpt.split import Rule, TensorSplit

Path = tuple[Any, ...]
"""Keys from the top of the state down; dict keys as they are, list positions as numbers."""

Kind = Literal["module", "optimizer", "stateful", "leaf"]

Merge = Callable[[Sequence[Any], int, int], Any]
"""`merge(saved, dp_rank, dp_size)`: makes of what every data-parallel rank that saved held of a part, in their order
(its `state_dict()`, or a Python value; None where a rank had none), what this data-parallel rank of now gets.

For a sampler of which rank r of n takes every n-th sample of one order, from r on, and counts them, none is lost and
none comes twice if it goes on with what was left after each of the jobs before it; each job has a list of how many
samples each of its ranks took:

    def merge(saved, dp_rank, dp_size):
        return {"taken": 0, "jobs": [*saved[0]["jobs"], [own["taken"] for own in saved]]}

    left = order  # of which this rank takes left[dp_rank::dp_size][taken:]
    for took in jobs:
        left = [sample for i, sample in enumerate(left) if i // len(took) >= took[i % len(took)]]

A loader with a state of its own over such a sampler (`StatefulDataLoader` of torchdata, whose sampler's `__iter__` must
then be a generator, or which must be made after the load if it has workers) is dropped: `new_world={"loader": "drop"}`.
What the sampler counts are samples that training has had; its loader may have taken more in advance.
"""

NewWorld = Literal["fail", "own", "first", "drop"] | Merge
"""What a rank gets, of values that differ between ranks, when the number of ranks has changed: an error; its own
where there was a rank of its number, else what it has now; or those of rank 0.

The other two are for what counts in terms of its rank, and would mean something else to another number of ranks even
if all held it alike: `drop`, what the rank has now, whatever was saved; and a function, what that gives."""


@runtime_checkable
class Stateful(Protocol):
    """What PyTorch's schedulers, loaders and scalers have."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(slots=True)
class Part:
    """One piece of a state: where it is, what it belongs to, and its content now (nested containers).

    Not to be changed; to say so (`frozen`) would cost 1 us more to make one, and a state may have 20,000.
    """

    path: Path
    kind: Kind
    owner: Any
    """The live object; for a leaf the mapping that holds it."""
    tree: Any
    rules: Mapping[str, Rule] | None = None
    """Of a module in a `TensorSplit`, or an optimizer of one: how tensors join to whole ones, by full name."""
    _key: str = field(default="", init=False, repr=False, compare=False)

    @property
    def key(self) -> str:
        """The flat name; a load asks a part of a single tensor nine times for it."""
        if not self._key:
            self._key = join_path(self.path)
        return self._key


def join_path(path: Path) -> str:
    """The flat name of a path, as DCP names it: its keys joined by dots."""
    return ".".join(map(str, path))


class StateReader:
    """Takes states apart, and remembers the names of parameters from save to save. One per manager."""

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[torch.nn.Module, _Names] = WeakKeyDictionary()

    def take_apart(self, state: Mapping[str, Any], *, for_loading: bool = False) -> list[Part]:
        """The parts of a state, in its order. Called on the caller's thread of every rank.

        With `for_loading`, an optimizer that has not stepped yet is given its (zero) state first, so that there is
        something to load into; for saving it is left exactly as it is.
        """
        found = list(_find(state, ()))
        owners = [owner for _, owner, _ in found if not isinstance(owner, torch.Tensor)]  # of 20,000 leaves, none
        splits = {owner.module: owner for owner in owners if isinstance(owner, TensorSplit)}
        modules = {owner: None for owner in owners if isinstance(owner, torch.nn.Module)} | splits
        return [
            Part(path, "leaf", holder, owner)
            if isinstance(owner, torch.Tensor)
            else self._part(path, owner, holder, modules, for_loading)
            for path, owner, holder in found
        ]

    def _part(self, path: Path, owner: Any, holder: Any, modules: _Modules, for_loading: bool) -> Part:
        if isinstance(owner, TensorSplit):
            tree = self._names_of(owner.module).state_of(owner.module)
            return Part(path, "module", owner.module, tree, owner.rules_of_state(join_path(path), tree))
        if isinstance(owner, torch.nn.Module):
            return Part(path, "module", owner, self._names_of(owner).state_of(owner))
        if isinstance(owner, torch.optim.Optimizer):
            module = owner_of(owner, modules)
            if module is None:
                return Part(path, "stateful", owner, owner.state_dict())
            holder = holder_of(owner)
            was_empty = not holder.state
            if for_loading and was_empty:
                make_state(module, holder)
            names = self._names_of(module).parameters
            made = OptimizerOf(owner, module, names, was_empty)
            tree, split = optimizer_tree(owner, names), modules[module]
            if holder is not owner:
                return Part(path, "optimizer", made, tree, all_own(join_path(path), tree["state"]))
            if split is None:
                return Part(path, "optimizer", made, tree)
            parameters = {names[id(p)]: p for group in owner.param_groups for p in group["params"]}
            rules = split.rules_of_moments(join_path(path), tree["state"], parameters=parameters)
            return Part(path, "optimizer", made, tree, rules)
        if not isinstance(owner, type) and isinstance(owner, Stateful):
            return Part(path, "stateful", owner, owner.state_dict())
        return Part(path, "leaf", holder, owner)

    def _names_of(self, module: torch.nn.Module) -> _Names:
        known = self._names.get(module)
        if known is None or not known.fits(module):
            known = self._names[module] = _Names(module)
        return known


_Modules = Mapping[torch.nn.Module, TensorSplit | None]
"""Those of the state, and how they are split."""


class _Names:
    """What torch calls the entries of a module's state, however the module is wrapped."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._plain = {raw: _plain_name(module, raw) for raw in module.state_dict()}
        self.parameters = {id(parameter): _plain_name(module, raw) for raw, parameter in module.named_parameters()}

    def fits(self, module: torch.nn.Module) -> bool:
        """Whether these are still the module's parameters; a changed entry is found in `state_of`."""
        return {id(parameter) for parameter in module.parameters()} == self.parameters.keys()

    def state_of(self, module: torch.nn.Module) -> dict[str, Any]:
        """The module's state by plain name; tensors are the module's own memory, not copies."""
        state = module.state_dict()
        if state.keys() != self._plain.keys():
            self._plain = {raw: _plain_name(module, raw) for raw in state}
        return {self._plain[raw]: value for raw, value in state.items()}


def _plain_name(module: torch.nn.Module, raw: str) -> str:
    """The name that `get_model_state_dict` gives an entry.

    2026-11: torch keeps the rule (what DDP, FSDP, `torch.compile` put into a name) in a private function; stripping
    words ourselves would go wrong for a user's own submodule called "module". Its public callers compute all names
    anew each time, which cost 13 ms per save for 90 parameters and their moments.
    """
    names = torch_state._get_fqns(module, raw) if not raw.endswith(_EXTRA_STATE) else {raw}
    if len(names) != 1:
        raise InvalidStateError(
            f"{raw} is a flat parameter of FSDP1 that holds {len(names)} parameters; use fully_shard (FSDP2), or put "
            "get_state_dict(...) of torch.distributed.checkpoint.state_dict into the state"
        )
    return next(iter(names))


_EXTRA_STATE = "_extra_state"


def is_extra_state(name: str) -> bool:
    """Whether the key is that of what a module gives by `get_extra_state`, or below it."""
    return _EXTRA_STATE in name and _EXTRA_STATE in name.split(".")


def put_together(parts: list[Part]) -> dict[str, Any]:
    """The nested tree that the parts make up: what is stored."""
    tree: dict[str, Any] = {}
    for part in parts:
        node = tree
        for key in part.path[:-1]:
            node = node.setdefault(key, {})
        node[part.path[-1]] = part.tree
    return tree


def restore(part: Part, loaded: Any) -> None:
    """Give a part, which is no optimizer, its loaded content; tensors of modules have been filled in place before.

    Called on the caller's thread of every rank, parts in the order of the state, `RngState` last.
    """
    if part.kind == "module":
        _restore_extra_state(part.owner, loaded)
    elif part.kind == "stateful":
        part.owner.load_state_dict(loaded)
    else:
        _restore_leaf(part, loaded)


def _find(node: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    """(path, object or leaf, the mapping that holds it) of everything in nested dicts."""
    for key, value in node.items():
        here = (*path, key)
        if isinstance(value, torch.Tensor):  # asked first: whether something is a mapping takes longer to say
            yield here, value, node
        elif isinstance(value, Mapping) and not isinstance(value, torch.nn.Module):
            if value:
                yield from _find(value, here)
            else:
                yield here, value, node
        else:
            yield here, value, node


def _restore_extra_state(module: torch.nn.Module, loaded: Mapping[str, Any]) -> None:
    extra = {k: value for k, value in loaded.items() if k.endswith(_EXTRA_STATE) or not isinstance(value, torch.Tensor)}
    if extra:
        torch_state.set_model_state_dict(module, extra, options=torch_state.StateDictOptions(strict=False))


def _restore_leaf(part: Part, loaded: Any) -> None:
    if isinstance(part.tree, torch.Tensor):
        return
    if not isinstance(part.owner, MutableMapping):
        raise InvalidStateError(f"{part.key}: its value is to be restored, but the mapping that holds it is read-only")
    part.owner[part.path[-1]] = loaded
