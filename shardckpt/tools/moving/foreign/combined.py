"""One state put together of several sources, or of one in another nesting. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import CheckpointDamagedError
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Stands in a tree for a tensor of a source."""

    source: TensorSource
    name: str


def origins(source: TensorSource) -> Any:
    """The tree of a source, for a `Combined`."""
    return walk(source.tree, TensorName, lambda path, leaf: _origin(source, leaf))


def _origin(source: TensorSource, leaf: Any) -> Any:
    return Origin(source, leaf.name) if isinstance(leaf, TensorName) else leaf


class Combined:
    """A state whose tensors stand where the tree has their `Origin`s; names follow from that."""

    def __init__(self, tree: Any, *, close: Callable[[], None] = lambda: None) -> None:
        """`close`: what is to be done when it is closed, besides closing its sources.

        `CheckpointDamagedError` if two tensors would have one name.
        """
        self._close = close
        self._origins: dict[str, Origin] = {}
        self._ties: dict[str, str] = {}
        self._facts: dict[str, TensorFacts] = {}
        self._sources: dict[int, TensorSource] = {}
        self._known: dict[int, tuple[Mapping[str, TensorFacts], Mapping[str, str]]] = {}
        self._first: dict[tuple[int, str], str] = {}
        self._tree = walk(tree, Origin, self._visit)

    def _visit(self, path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Origin):
            return leaf
        name, number = flat_name(path), id(leaf.source)
        if name in self._origins:
            raise CheckpointDamagedError(f"two tensors of the state are both called {name[:200]!r}")
        if number not in self._known:
            self._sources[number] = leaf.source
            self._known[number] = (leaf.source.tensors, leaf.source.ties)
        facts, ties = self._known[number]
        own = ties.get(leaf.name, leaf.name)
        first = self._first.setdefault((number, own), name)
        self._origins[name] = Origin(leaf.source, own)
        if first != name:
            self._ties[name] = first
        else:
            self._facts[name] = facts[own]
        return TensorName(name)

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return dict(self._facts)

    @property
    def ties(self) -> Mapping[str, str]:
        return dict(self._ties)

    @property
    def tree(self) -> Any:
        return self._tree

    def read(self, windows: Sequence[Window]) -> None:
        by_source: dict[int, list[Window]] = {}
        for window in windows:
            origin = self._origins[window.name]
            by_source.setdefault(id(origin.source), []).append(Window(origin.name, window.start, window.into))
        for number, those in by_source.items():
            self._sources[number].read(those)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._close()
