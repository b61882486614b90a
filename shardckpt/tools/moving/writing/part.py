"""The one part of a state that a model file holds, by the names that the model itself has for its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import InvalidStateError
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.seam import TensorName, TensorSource

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class OnePart:
    """A part of a source. Names are below the part: "layers.0.weight"."""

    tensors: Mapping[str, str]
    """Every tensor that has bytes of its own -> its name in the source."""
    ties: Mapping[str, str]
    """Name -> the name in `tensors` that stands for the same bytes."""


def only_tensors(source: TensorSource) -> OnePart:
    """`InvalidStateError` if there is more than one part, or a value that is no tensor; None and {} are passed over."""
    tree = source.tree
    if not isinstance(tree, Mapping) or len(tree) != 1:
        parts = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "no parts"
        raise InvalidStateError(f"safetensors holds the tensors of one part, and there is {parts}: name one")
    (below,) = tree.values()
    first, tensors, ties, others = dict[str, str](), dict[str, str](), dict[str, str](), list[str]()

    def visit(path: Path, leaf: Any) -> Any:
        name = flat_name(path)
        if isinstance(leaf, TensorName):
            own = source.ties.get(leaf.name, leaf.name)
            if name in tensors or name in ties:
                raise InvalidStateError(f"two tensors of the state are both called {name!r}; rename one of them")
            if first.setdefault(own, name) == name:
                tensors[name] = own
            else:
                ties[name] = first[own]
        elif leaf is not None and leaf != {}:
            others.append(name)
        return leaf

    walk(below, TensorName, visit)
    if others:
        more = ", ..." if len(others) > _SHOWN else ""
        raise InvalidStateError(
            f"safetensors holds only tensors, and {', '.join(others[:_SHOWN])}{more} {'are' if others[1:] else 'is'} "
            "something else: write a .pt file, or leave that out"
        )
    return OnePart(tensors, ties)
