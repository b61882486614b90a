"""What a rank will load: the outcome of comparing its state with the record of a step. Data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from shardckpt.engine.loading.selecting.selection import Selection
from shardckpt.engine.loading.sources import Whose
from shardckpt.format.placement import Box
from shardckpt.format.tree import map_leaves
from shardckpt.state import Merge, NewWorld, Path, join_path


class WantedTensor(NamedTuple):
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
    """What this rank will load, and every reason why it should not. Names are the state's (see `Selection`)."""

    tensors: list[WantedTensor] = field(default_factory=list)
    values: list[WantedValue] = field(default_factory=list)
    trees: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By part: the ranks (of those that saved) whose nested values it takes; none: the part is left as it is."""
    extra: dict[str, int] = field(default_factory=dict)
    """By name of an extra state of a module: the rank (of those that saved) whose it takes."""
    merges: dict[str, Merge] = field(default_factory=dict)
    """By part: what makes of the values of the ranks in `trees` those of this rank."""
    stateless: dict[str, set[str]] = field(default_factory=dict)
    """By optimizer: the parameters for which the checkpoint has no state."""
    anew: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of optimizers and of extra states that had none to load into."""
    lenient: bool = False
    """What the checkpoint lacks is to be kept."""
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

    def with_new(self, tree: Any, path: Path) -> Any:
        """A saved tree, by the state's names, with the tensors of `anew` in it."""
        return map_leaves(tree, lambda path, leaf: self.anew.get(join_path(path), leaf), path)
