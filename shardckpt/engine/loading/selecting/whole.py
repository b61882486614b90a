"""The keys of parts, some of which are loaded as a whole or not at all: optimizers, and what loads itself. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence

from shardckpt.engine.loading.selecting.selection import View
from shardckpt.format.tree import map_leaves
from shardckpt.state import Part, join_path


def take_whole(part: Part, keys: Sequence[str], view: View) -> tuple[list[str], bool]:
    """What is wrong, and whether the part is taken. `keys` are those of its state and the selected ones of the view."""
    key, selection = part.key, view.selection
    kept = next((name for name in keys if selection.takes(name)), None)
    if kept is None:
        return [], False
    left = (name for name in (*keys, *view.passed_over) if not selection.takes(name) and is_below(name, (key,)))
    out = min(left, default=None) if selection.is_partial else None
    if out is not None:
        return [
            f"include, exclude: {key} is loaded as a whole or not at all, but {kept} is to be loaded, and {out} is "
            f"not; name {key!r} in one of them"
        ], False
    saved_key = selection.saved_name(key)
    for name in keys if selection.renames else ():
        of_parameter = part.kind == "optimizer" and name.startswith(f"{key}.state.")
        if not of_parameter and selection.saved_name(name) != saved_key + name[len(key) :]:
            return [f"rename: {name} lies in {key}, which is loaded as a whole: give {key} itself another name"], False
    return [], True


def keys_of(parts: Sequence[Part]) -> list[str]:
    """All keys of these parts of a state."""
    names: list[str] = []
    for part in parts:
        map_leaves(part.tree, lambda path, leaf: names.append(join_path(path)), part.path)
    return names


def parameters_of(parts: Sequence[Part]) -> list[str]:
    """The names below which optimizers have, or may have, the state of their parameters."""
    optimizers = [part for part in parts if part.kind == "optimizer"]
    return [f"{part.key}.state.{name}" for part in optimizers for name in part.owner.names.values()]


def is_below(name: str, parts: Container[str]) -> bool:
    """Whether the key is that of a part, or below one."""
    pieces = name.split(".")
    return any(".".join(pieces[: i + 1]) in parts for i in range(len(pieces)))
