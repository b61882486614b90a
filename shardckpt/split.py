"""How the plain tensors of hand-written tensor or expert parallelism join to whole ones: what the user says of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from shardckpt.errors import InvalidStateError


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor of which every tensor-parallel rank has a part, in the order of these ranks.

    Without `sizes` and `sections` all ranks have as much.
    """

    dim: int
    """The dimension in which the parts are joined; negative ones count from the end."""
    sizes: tuple[int, ...] = ()
    """What each tensor-parallel rank of this job has in that dimension."""
    sections: tuple[int, ...] = ()
    """The whole is made of sections of these sizes, as a fused query, key and value, and every rank has its even share
    of each: one after the other."""

    def __post_init__(self) -> None:
        if self.sizes and self.sections:
            raise ValueError("Split(sizes=..., sections=...): a tensor is cut by one of them")


Rule = Split | Literal["own"]
"""`own`: this rank has what others may not have, as an expert: a name of its own, or the same by all who have it."""


@dataclass(frozen=True)
class TensorSplit:
    """A module whose tensors are plain, and each rank's own part: put it into the state in the place of the module.

    >>> state = {"model": TensorSplit(torch.nn.Linear(2, 2), {"weight": 0, "bias": 0})}

    With it such a state loads on any number of tensor-parallel ranks, also where those have DTensors, or the whole.
    An optimizer of the module that is in the state follows it. The tensor-parallel ranks are those of the manager's
    `Gangs`. Of tensors that no rule names, all of a stage's ranks must have the same to load them on other numbers.

    Args:
        module: any module; on every rank with its own part.
        rules: by a pattern of parameter and buffer names (`*` matches dots, too) a dimension, a `Split`, or "own"; the
            first that fits counts.
    """

    module: torch.nn.Module
    rules: Mapping[str, int | Rule]
    _found: dict[str, Rule | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for pattern, rule in self.rules.items():
            if not isinstance(rule, (int, Split)) and rule != "own":
                raise ValueError(f"{pattern!r}: {rule!r} is no dimension, no Split(...), and not 'own'")

    def rule_of(self, name: str) -> Rule | None:
        """What is said of the parameter or buffer of that name."""
        if name not in self._found:
            rules = (rule for pattern, rule in self.rules.items() if fnmatch.fnmatchcase(name, pattern))
            rule = next(rules, None)
            self._found[name] = Split(rule) if isinstance(rule, int) else rule
        return self._found[name]

    def rules_of_state(self, key: str, state: Mapping[str, Any]) -> dict[str, Rule]:
        """By the full name of each tensor of the module's state, below `key`."""
        rules = ((name, self.rule_of(name)) for name, value in state.items() if isinstance(value, torch.Tensor))
        return {f"{key}.{name}": rule for name, rule in rules if rule is not None}

    def rules_of_moments(
        self, key: str, state: Mapping[str, Mapping[str, Any]], *, parameters: Mapping[str, torch.Tensor]
    ) -> dict[str, Rule]:
        """The same for the state of an optimizer: a tensor of the parameter's shape is cut as the parameter is."""
        rules: dict[str, Rule] = {}
        for name, values in state.items():
            rule = self.rule_of(name)
            for kind, value in values.items():
                if not isinstance(value, torch.Tensor) or rule is None:
                    continue
                if rule == "own" or value.shape == parameters[name].shape:
                    rules[f"{key}.state.{name}.{kind}"] = rule
        return rules


def cuts_of(name: str, shape: tuple[int, ...], split: Split, *, ranks: int, rank: int) -> list[list[tuple[int, int]]]:
    """(start, length) in the whole of what each of the ranks has in `split.dim`, in the order in which it has it.

    `shape` is that of the part of `rank`. `InvalidStateError` if it is not what the split says.
    """
    if not -len(shape) <= split.dim < len(shape):
        raise InvalidStateError(f"{name} has {len(shape)} dimensions, and is said to be split in dimension {split.dim}")
    own = shape[split.dim]
    if split.sections:
        shares = [size // ranks for size in split.sections]
        starts = [sum(split.sections[:number]) for number in range(len(shares))]
        if any(size % ranks for size in split.sections) or sum(shares) != own:
            raise InvalidStateError(
                f"{name}: sections of {list(split.sections)} on {ranks} ranks are not {own} on each of them"
            )
        places = list(zip(starts, shares, strict=True))
        return [[(start + number * share, share) for start, share in places] for number in range(ranks)]
    sizes = split.sizes or (own,) * ranks
    if len(sizes) != ranks or sizes[rank] != own:
        raise InvalidStateError(
            f"{name}: sizes {list(sizes)} are said of {ranks} tensor-parallel ranks, of which rank {rank} has {own}"
        )
    return [[(sum(sizes[:number]), size)] for number, size in enumerate(sizes)]
