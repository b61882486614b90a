"""Which tensors of a state do not change from step to step, by the word of whoever saves it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from shardckpt.errors import InvalidStateError
from shardckpt.format.tree import map_leaves
from shardckpt.state import Part, Path, join_path

ALL = "*"
"""Every parameter of a module in the state that requires no gradient."""


def frozen_names(parts: Sequence[Part], asked: Collection[str]) -> frozenset[str]:
    """The flat names of the tensors that are meant. On the caller's thread of every rank.

    Of a module only parameters are ever frozen: buffers may change in any forward pass. `InvalidStateError` for a name
    of which no tensor is there, and for a parameter that requires a gradient.

    Args:
        asked: names of tensors, or of what is above them ("base", "model.encoder": all below it), or `ALL`.
    """
    if isinstance(asked, str):
        raise InvalidStateError(f"frozen={asked!r}: give a collection of names, such as ({asked!r},)")
    if not asked:
        return frozenset()
    found, used = set[str](), {ALL}
    for part in parts:
        for name, tensor in _tensors(part):
            said = [word for word in asked if name == word or name.startswith(f"{word}.")]
            used.update(said)
            if said and tensor.requires_grad:
                raise InvalidStateError(
                    f"{name} is said to be frozen ({said[0]!r}), but it requires a gradient: training would change it"
                )
            if said or (ALL in asked and isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad):
                found.add(name)
    unknown = sorted(set(asked) - used)
    if unknown:
        raise InvalidStateError(f"frozen={unknown[0]!r}: the state has no tensor of that name that could be frozen")
    return frozenset(found)


def _tensors(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    """What could be frozen of a part, as the live tensors."""
    if part.kind == "optimizer":
        return
    if part.kind == "module":
        live = part.owner.state_dict(keep_vars=True).values()  # in the order of the part's own names
        for name, tensor in zip(part.tree, live, strict=True):
            if isinstance(tensor, torch.nn.Parameter):
                yield join_path((*part.path, name)), tensor
        return
    leaves: list[tuple[Path, torch.Tensor]] = []

    def look(path: Path, leaf: object) -> None:
        if isinstance(leaf, torch.Tensor):
            leaves.append((path, leaf))

    map_leaves(part.tree, look, part.path)
    yield from ((join_path(path), tensor) for path, tensor in leaves)
