"""From flat names back to the nested state, by paths that a file gives. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPARE = 1024
"""Places of lists, over all of them, of which a file may say nothing."""


def nest(leaves: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """The leaves at their paths: a text is the key of a dict, a number the place in a list, as DCP has it.

    Places of a list to which no path leads are None. `paths` are untrusted: `ValueError` where two contradict each
    other, or a list is said to be far longer than there are leaves.
    """
    root: dict[str | int, Any] = {}
    for name, leaf in leaves.items():
        _put(root, paths[name], _Leaf(leaf), name)
    if any(type(key) is not str for key in root):
        raise ValueError("a state that is a list")
    room = [2 * len(leaves) + _SPARE]
    return {str(key): _build(node, room) for key, node in root.items()}


class _Leaf:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _put(root: dict[str | int, Any], path: tuple[str | int, ...], leaf: _Leaf, name: str) -> None:
    node = root
    for key in path[:-1]:
        below = node.setdefault(key, {})
        if type(below) is not dict:
            raise ValueError(f"{name} lies inside of another value")
        node = below
    if path[-1] in node:
        raise ValueError(f"{name} lies where something else does")
    node[path[-1]] = leaf


def _build(node: Any, room: list[int]) -> Any:
    if type(node) is _Leaf:
        return node.value
    kinds = {type(key) for key in node}
    if kinds == {str}:
        return {key: _build(below, room) for key, below in node.items()}
    if kinds != {int} or min(node) < 0:
        raise ValueError("a container that is both a list and a dict")
    room[0] -= max(node) + 1
    if room[0] < 0:
        raise ValueError("a list that is far longer than what is in it")
    return [_build(node[at], room) if at in node else None for at in range(max(node) + 1)]
