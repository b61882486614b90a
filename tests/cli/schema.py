"""What `--json` prints, as tables of Markdown, made from the dataclasses: `python -m tests.cli.schema` writes them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardckpt.run.prune import PruneReport
from shardckpt.run.registry.summary import RunsFound
from shardckpt.tools.average import AverageReport
from shardckpt.tools.convert import ConvertReport
from shardckpt.tools.copying.steps import CopyReport
from shardckpt.tools.examining.bench import BenchReport
from shardckpt.tools.examining.findings import Examination
from shardckpt.tools.export import ExportReport
from shardckpt.tools.listing import Listing
from shardckpt.tools.looking.inspect import Inspection
from shardckpt.tools.looking.reading import ReadingPlan
from shardckpt.tools.looking.two import StepsDiff
from shardckpt.tools.page.facts import RunFacts
from shardckpt.tools.repair import RepairReport
from shardckpt.tools.report import RunReport

PAGE = Path(__file__).parents[2] / "shardckpt/cli/README.md"
BEGIN = "<!-- made by python -m tests.cli.schema -->\n"

REPORTS: Mapping[str, type] = {
    "ls": Listing,
    "inspect": Inspection,
    "plan": ReadingPlan,
    "diff": StepsDiff,
    "verify": RunReport,
    "repair": RepairReport,
    "convert": ConvertReport,
    "export": ExportReport,
    "average": AverageReport,
    "merge-lora": ExportReport,
    "cp": CopyReport,
    "doctor": Examination,
    "bench": BenchReport,
    "report": RunFacts,
    "runs": RunsFound,
    "prune": PruneReport,
}
"""Command -> what it prints. One that is not here is not described yet."""

_NAMES = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    object: "any",
    Any: "any",
}


def described() -> str:
    """The part of the page that is made."""
    parts, told = [], dict[type, None]()
    for command, report in REPORTS.items():
        also = ", and `ok`, true or false" if isinstance(getattr(report, "ok", None), property) else ""
        article = "an" if report.__name__[0] in "AEIOU" else "a"
        parts.append(f"`shardckpt {command} --json`: {article} `{report.__name__}`{also}.\n")
        for cls in _with_those_in_it(report):
            if cls not in told:
                parts.append(_table(cls))
                told[cls] = None
    return "\n".join(parts)


def _with_those_in_it(cls: type) -> Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in _classes(hint):
            yield from _with_those_in_it(inner)


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _table(cls: type) -> str:
    hints, says = typing.get_type_hints(cls), _sayings(cls)
    rows = [f"| `{f.name}` | {_json(hints[f.name])} | {says.get(f.name, '')} |" for f in dataclasses.fields(cls)]
    return "\n".join([f"| `{cls.__name__}` | JSON | what |", "| --- | --- | --- |", *rows, ""])


def _sayings(cls: type) -> dict[str, str]:
    """The strings below the fields, in one line."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    found, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split()).replace("|", "\\|")
    return found


def _json(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f'"{value}"' for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_json, inner))
    if origin is tuple:
        return f"list of {_json(inner[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"object, each value {_json(inner[1])}"
    return _NAMES.get(hint) or f"`{hint.__name__}`"


def main() -> None:
    """Write it into the page."""
    head, _, _ = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{described()}")


if __name__ == "__main__":
    sys.exit(main())
