"""`shardckpt repair`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, explaining, print_json, say


def repair(
    url: Annotated[str, typer.Argument(metavar="URL", help="The run.")],
    *,
    step: Annotated[int, typer.Option("--step", min=0, help="Which step.")],
    apply: Annotated[
        bool, typer.Option("--apply", "--yes", help="Do it. Without this, only say what would be done.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="How many ranks saved it: no file says so.")
    ] = None,
    attempt: Annotated[str | None, typer.Option("--attempt", help="Which of several attempts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring back a lost or damaged record, or set a damaged step aside. A dry run unless --apply is given.

    A record with a flipped bit is mended; one that is lost is made anew from the files, all of which must be sound; an
    attempt that was written and not committed becomes a checkpoint in the same way. A step with damaged files gets a
    name under which it is never offered. Nothing is ever deleted. Nobody may be saving this step meanwhile.

    Ends with 0 if the step is sound (now), 1 if there is something to be done or it cannot be, 2 for wrong usage.

    Example: shardckpt repair runs/a --step 1000 --ranks 8
    """
    with explaining():
        from shardckpt.tools.repair import repair as mend

        report = mend(url, step=step, apply=apply, ranks=ranks, attempt=attempt)
    if as_json:
        print_json(report)
    else:
        done = "" if report.kind == "nothing" else " (done)" if report.applied else " (not done: a dry run)"
        typer.echo(f"step {report.step}: {report.kind}{done}: {report.what}")
        if report.lost:
            typer.echo(f"  what does not come back: {', '.join(report.lost)}")
        if report.after is not None:
            typer.echo(f"  verify now says: {report.after.verdict}")
    if report.kind != "nothing" and not report.applied:
        say("nothing was changed; --apply does it")
        raise typer.Exit(PROBLEMS)
