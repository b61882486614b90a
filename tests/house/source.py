"""The source files of a package, parsed, for the house rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of this repository."""


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: str
    """Relative to the repository, with slashes."""
    text: str
    tree: ast.Module

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the module: ("shardckpt", "gang", "base"); of a package without "__init__"."""
        names = tuple(self.path.removesuffix(".py").split("/"))
        return names[:-1] if names[-1] == "__init__" else names

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


def sources(root: Path, *folders: str) -> list[Source]:
    """All Python files below these folders of `root`."""
    return [
        Source(path.relative_to(root).as_posix(), text := path.read_text(), ast.parse(text))
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    ]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, anywhere in it: "a.b.c" of `from a.b import c`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = source.parts if source.is_package else source.parts[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
