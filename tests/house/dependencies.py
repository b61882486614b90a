"""What the package imports is declared: as a dependency, or in an extra if a function imports it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from tests.house.source import Source, imports

OUTSIDE = {
    "aiohttp": "s3fs",
    "botocore": "s3fs",
    "mlflow": "mlflow_skinny",
    "opentelemetry": "opentelemetry_sdk",
    "typing_extensions": "torch",
    "yaml": "pyyaml",
}
"""Imported name -> what brings it, where the names differ."""

FOR_TESTS = ("shardckpt/testing/", {"pytest"})
"""Who inherits a test suite has pytest."""


def problems(files: Iterable[Source], project: Mapping[str, object]) -> list[str]:
    """Every import of the package that no dependency in `project` (the table of pyproject.toml) brings."""
    always = set(_names(project["dependencies"]))
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    sometimes = always.union(*(_names(extra) for name, extra in extras.items() if name != "test"))
    found = []
    for source in files:
        early = set(_at_import(source))
        for line, name in imports(source):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in ("shardckpt", "__future__"):
                continue
            brought_by = OUTSIDE.get(top, top)
            if brought_by not in sometimes:
                found.append(f"{source.path}:{line}: no dependency brings {top}")
            elif line in early and brought_by not in always | _given(source):
                found.append(f"{source.path}:{line}: {top} comes with an extra only; import it in a function")
    return found


def _given(source: Source) -> set[str]:
    folder, names = FOR_TESTS
    return names if source.path.startswith(folder) else set()


def _names(requirements: object) -> Iterator[str]:
    assert isinstance(requirements, list)
    for requirement in requirements:
        yield re.split(r"[^\w.-]", requirement)[0].lower().replace("-", "_")


def _at_import(source: Source) -> Iterator[int]:
    """The lines of the imports that are carried out when the module is imported."""
    waiting: list[ast.AST] = [source.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
