"""`shardckpt doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardckpt.cli.looking import AsJson
from shardckpt.cli.output import PROBLEMS, console, explaining, print_json, say

_MARKS = {"good": ("ok", "green"), "note": ("note", "yellow"), "problem": ("problem", "bold red")}


def doctor(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", help="Where checkpoints are to lie.")] = None,
    *,
    mb: Annotated[int, typer.Option("--mb", min=1, help="Megabytes by which rates are measured.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Look at this machine and at a place: what works there, what it costs, what to set.

    Versions, memory, limits; of a place: space, write-once, conditional put, rename, exchange, sync, direct I/O,
    whether writes are seen at once, clock, rates. It tries them in a folder of its own, and leaves nothing behind.

    Ends with 0 if nothing is a problem, 1 if something is, 2 if nothing can be written there.

    Example: shardckpt doctor s3://lab/runs
    """
    with explaining():
        from shardckpt.tools.examining.doctor import examine

        found = examine(url, nbytes=mb * 1_000_000)
    if as_json:
        print_json(found, ok=found.ok)
    else:
        from rich.text import Text

        out = console()
        for finding in found.findings:
            mark, colour = _MARKS[finding.level]
            out.print(Text.assemble((f"{mark:<7}", colour), f"  {finding.name}: {finding.what}"), soft_wrap=True)
            if finding.advice:
                out.print(Text(f"         {finding.advice}", "dim"), soft_wrap=True)
    if not found.ok:
        say("there are problems; see above")
        raise typer.Exit(PROBLEMS)
