"""Walks through nested states whose tensors are stood for by objects of some class. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardckpt.errors import CheckpointDamagedError

Path = tuple[Any, ...]
Kind = type | tuple[type, ...]

MOST_LEVELS = 100
"""Containers within each other, as everywhere in a state."""


def walk(tree: Any, kind: Kind, visit: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same nesting with each leaf replaced, by the rules of `format.tree.map_leaves`, for tensors of this kind.

    Mappings become plain dicts; lists and tuples are entered only where there is a tensor or a mapping below.
    `CheckpointDamagedError` for what is nested too deeply.
    """
    if len(path) > MOST_LEVELS:
        raise CheckpointDamagedError(f"more than {MOST_LEVELS} containers within each other below {path[0]!r}")
    if isinstance(tree, kind):
        return visit(path, tree)
    if isinstance(tree, Mapping) and tree:
        return {key: walk(item, kind, visit, (*path, key)) for key, item in tree.items()}
    if type(tree) in (list, tuple) and _holds(tree, kind, 0):
        items = [walk(item, kind, visit, (*path, number)) for number, item in enumerate(tree)]
        return items if type(tree) is list else tuple(items)
    return visit(path, tree)


def holds(tree: Any, kind: type) -> bool:
    """Whether a tensor of this kind is in it, or it is one."""
    if isinstance(tree, kind):
        return True
    below = tree.values() if isinstance(tree, Mapping) else tree if type(tree) in (list, tuple) else ()
    return any(holds(item, kind) for item in below)


def flat_name(path: Path) -> str:
    """The flat name of a path: its keys joined by dots, as `state.join_path` does."""
    return ".".join(map(str, path))


def _holds(items: Iterable[Any], kind: Kind, depth: int) -> bool:
    """Whether there is a tensor or a mapping below; not where it is nested too deeply, which fails elsewhere."""
    if depth > MOST_LEVELS:
        return False
    for item in items:
        if isinstance(item, (kind, dict)):
            return True
        if type(item) in (list, tuple) and item and _holds(item, kind, depth + 1):
            return True
    return False
