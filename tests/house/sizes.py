"""How long things may be: files, functions, folders, parameter lists; and names that promise nothing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.house.source import Source, imports

FILE_LINES = {"shardckpt": 300, "tests": 500, "benchmarks": 300}
FUNCTION_LINES = 60
FOLDER_FILES = 9
"""Python files in a folder of the package, besides `__init__.py`."""
PARAMETERS = 8
"""Of any function of the package; `self` and `cls` are not counted."""
POSITIONAL = 2
"""Of those, how many of a function or method of the public face may be given by position; `*args` is not counted."""
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "misc"}

FOREIGN_SHAPES = {"__exit__", "__aexit__"}
"""Python gives these their parameters."""


def problems(files: Iterable[Source]) -> list[str]:
    """Everything that is too long, in files of the package and of the tests."""
    return [*_files(files), *_folders(files), *_functions(files)]


def _files(files: Iterable[Source]) -> Iterator[str]:
    for source in files:
        lines, limit = source.text.count("\n"), FILE_LINES[source.parts[0]]
        if lines > limit:
            yield f"{source.path}: {lines} lines, at most {limit}"
        for name in EMPTY_NAMES & set(source.parts):
            yield f"{source.path}: the name {name!r} says nothing"


def _folders(files: Iterable[Source]) -> Iterator[str]:
    counts = Counter(
        source.path.rpartition("/")[0]
        for source in files
        if source.parts[0] == "shardckpt" and not source.is_package and source.parts != ("shardckpt", "__main__")
    )
    for folder, count in counts.items():
        if count > FOLDER_FILES:
            yield f"{folder}: {count} files, at most {FOLDER_FILES}"


def _functions(files: Iterable[Source]) -> Iterator[str]:
    face = _public_names(files)
    for source in files:
        for node, name in _named(source.tree, ""):
            place = f"{source.path}:{node.lineno}: {name}"
            lines = (node.end_lineno or node.lineno) + 1 - node.lineno
            if lines > FUNCTION_LINES:
                yield f"{place} has {lines} lines, at most {FUNCTION_LINES}"
            if source.parts[0] == "shardckpt" and node.name not in FOREIGN_SHAPES:
                positional, total = _parameters(node)
                if total > PARAMETERS:
                    yield f"{place} takes {total} parameters, at most {PARAMETERS}"
                if positional > POSITIONAL and _is_shown(name) and (*source.parts[1:], name.split(".")[0]) in face:
                    yield f"{place} takes {positional} positional arguments, at most {POSITIONAL}"


def _public_names(files: Iterable[Source]) -> set[tuple[str, ...]]:
    """Where the names of the public face are defined: ("gang", "gangs", "Gangs"), ..."""
    faces = [source for source in files if source.parts == ("shardckpt",)]
    return {tuple(name.split(".")[1:]) for face in faces for _, name in imports(face)}


def _is_shown(name: str) -> bool:
    return all(not part.startswith("_") or part == "__init__" for part in name.split("."))


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _named(node: ast.AST, prefix: str) -> Iterator[tuple[_Function, str]]:
    """Every function with its dotted name, those inside others too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child, prefix + child.name
            yield from _named(child, f"{prefix}{child.name}._inner.")
        elif isinstance(child, ast.ClassDef):
            yield from _named(child, f"{prefix}{child.name}.")
        else:
            yield from _named(child, prefix)


def _parameters(node: _Function) -> tuple[int, int]:
    """How many can be given by position, and how many there are."""
    given = node.args.posonlyargs + node.args.args
    if given and given[0].arg in ("self", "cls"):
        given = given[1:]
    return len(given), len(given) + len(node.args.kwonlyargs) + (node.args.kwarg is not None)
