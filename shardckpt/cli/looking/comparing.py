"""`shardckpt diff`: how two steps differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.looking.inspecting import Filter, many
from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, console, explaining, print_json, progress, say

if TYPE_CHECKING:
    from rich.console import Console

    from shardckpt.tools.looking.diff import Difference, TensorDiff
    from shardckpt.tools.looking.two import StepsDiff

_SHOWN = 5


def diff(
    first: Annotated[str, typer.Argument(metavar="URL_A", help="A run (its newest step), or a step (.../step_100).")],
    second: Annotated[str, typer.Argument(metavar="URL_B", help="The same.")],
    *,
    only: Filter = None,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Of what each rank has its own, which is compared.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Say how two steps differ, on whatever ranks each was saved: keys, shapes, dtypes, values, and how far apart the
    elements of each tensor are.

    Of tensors of other dtypes the values are compared. NaN is equal to NaN. Both are read whole, piece by piece, and
    checked. Ends with 0 if they are alike, 1 if not, or if one is not there or damaged, 2 for wrong usage.

    Example: shardckpt diff runs/a/step_1000 runs/b/step_1000 --filter model
    """
    with explaining(), progress("comparing with step") as bar:
        from shardckpt.tools.looking.two import diff as look

        found = look(first, second, only=only or (), rank=rank, told=bar)
    if as_json:
        print_json(found, alike=found.difference.is_none)
    else:
        _print(found, console())
    compared = found.difference.compared + found.difference.compared_values
    if only and found.difference.is_none and not compared:
        say(f"nothing in either matches {' or '.join(only)}")
    if not found.difference.is_none or not compared:
        raise typer.Exit(PROBLEMS)


def _print(found: StepsDiff, out: Console) -> None:
    from rich.text import Text

    difference = found.difference
    out.print(Text(f"A  {found.first}\nB  {found.second}"), soft_wrap=True)
    if difference.tensors:
        _print_tensors(difference, out)
    for side, names in (("A", difference.only_first), ("B", difference.only_second)):
        if names:
            out.print(Text(f"only in {side}: {_listed(names)}"))
    for value in difference.values:
        out.print(Text(f"{value.name}: {value.texts[0]} in A, {value.texts[1]} in B"))
    if found.own:
        whose = f"those of rank {found.rank} were compared"
        out.print(Text(f"each rank has its own of {many(len(found.own), 'tensor')} ({_listed(found.own)}); {whose}"))
    apart = f"{many(len(difference.tensors), 'tensor')} and {many(len(difference.values), 'value')} of these differ"
    ends = "alike" if difference.is_none else apart
    both = f"{many(difference.compared, 'tensor')} and {many(difference.compared_values, 'value')}"
    out.print(Text(f"{both} in both; {ends}"))


def _print_tensors(difference: Difference, out: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensor", "dtype", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("unequal", "max", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in difference.tensors:
        dtype = " / ".join(dict.fromkeys(line.dtypes))
        shape = " / ".join(dict.fromkeys("x".join(map(str, shape)) or "()" for shape in line.shapes))
        table.add_row(line.name, dtype, shape, *_numbers(line))
    out.print(table)


def _numbers(line: TensorDiff) -> tuple[str, str, str]:
    if line.unequal is None or line.elements is None:
        return "-", "-", "-"
    largest, mean = (f"{value:.3g}" if value is not None else "-" for value in (line.max_abs, line.mean_abs))
    odd = f" ({line.not_finite} not finite)" if line.not_finite else ""
    return f"{line.unequal} of {line.elements}{odd}", largest, mean


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
