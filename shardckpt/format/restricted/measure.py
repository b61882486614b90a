"""How much a tree that came out of a pickle stands for, found without walking what is shared more than once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from shardckpt.format.restricted.allowed import Record, is_value

MAX_DEPTH = 256
"""Containers within containers: what other code can still walk by recursion."""
MAX_NODES = 1 << 24
MAX_SHARING = 64
"""Nodes of a tree if nothing were shared: at most so many, or so many for each byte. A bound on walking it."""


def check_tree(tree: Any, nbytes: int) -> None:
    """`ValueError` for what is no tree of values, or unfolds to more than a pickle of so many bytes may."""
    nodes, _ = _measure(tree, {}, 0)
    if nodes > max(MAX_NODES, MAX_SHARING * nbytes):
        raise ValueError(f"a pickle of {nbytes} bytes that unfolds to {nodes} values")


def shares_too_much(value: Any, nbytes: int) -> bool:
    """Whether a value that is spelled in so many bytes stands for more than they may.

    Pickles that are put together from values that do not, are never refused for it. (Too deep ones are, elsewhere.)
    """
    try:
        return _measure(value, {}, 0)[0] > MAX_SHARING * nbytes
    except ValueError:
        return False


def _measure(node: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """(values of a tree as if nothing were shared, containers within containers); `ValueError` where it is none.

    `known` holds what was measured before, by identity; (0, 0) marks what is being measured.
    """
    if not is_value(node):
        raise ValueError("something that is not a value")
    if type(node) not in _CONTAINERS:
        return 1, 0
    measured = known.get(id(node))
    if measured is not None and measured[0]:
        return measured
    if measured is not None or depth >= MAX_DEPTH:
        raise ValueError(f"a container within itself, or more than {MAX_DEPTH} within each other")
    known[id(node)] = (0, 0)
    count, height = 1, 0
    for child in _children(node):
        if type(child) in _SCALARS:
            count += 1
            continue
        below, deep = _measure(child, known, depth + 1)
        count, height = count + below, max(height, deep)
    if height >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} containers within each other")
    known[id(node)] = (count, height + 1)
    return count, height + 1


_SCALARS = frozenset((str, int, float, bool, type(None), bytes, torch.Tensor))
_CONTAINERS = frozenset((list, tuple, dict, set, OrderedDict, Counter, Record))


def _children(node: Any) -> Iterable[Any]:
    if type(node) is dict:
        return node.values()
    if type(node) is Record:
        return (node.state,)
    if isinstance(node, dict):
        return [*node.values(), *vars(node).values()]
    children: Iterable[Any] = node
    return children
