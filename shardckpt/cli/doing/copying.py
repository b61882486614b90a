"""`shardckpt cp`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, explaining, print_json, progress, say, size_text

if TYPE_CHECKING:
    from shardckpt.tools.copying.steps import CopiedStep


def cp(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A run, or one step of it (.../step_100).")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The run it goes to; it need not be there yet.")],
    *,
    step: Annotated[int | None, typer.Option("--step", min=0, help="This step; else the newest.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every committed step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy committed steps to another place of any kind: a path, s3://, ...

    Every byte is held against the digest in the record on the way; a step is whole at its new place, or absent. What
    is there is never replaced. If it is interrupted, the same command goes on: files that are there and sound are not
    copied again. Scores are copied, too; what lies in the root of the run (cc/, model.yaml) is not.

    Ends with 0 if all that was meant is there now, 1 if something is damaged, missing, or there is another step of
    that number, 2 if a place cannot be reached.

    Example: shardckpt cp runs/a s3://lab/runs/a --all
    """
    with explaining(), progress("step") as bar:
        from shardckpt.tools.copying.steps import copy_steps

        report = copy_steps(source, target, step=step, every=every, told=bar)
    if as_json:
        print_json(report, ok=report.ok)
    else:
        for done in report.steps:
            typer.echo(_line(done))
            if done.what:
                say(done.what)
    if not report.ok:
        raise typer.Exit(PROBLEMS)


def _line(done: CopiedStep) -> str:
    text = f"step {done.step}: {done.outcome}"
    if done.files:
        text += f", {done.files} file{'s' * (done.files != 1)}, {size_text(done.nbytes)}"
    if done.found_nbytes:
        text += f" ({size_text(done.found_nbytes)} of it by an earlier try)"
    if done.outcome == "copied" and done.seconds:
        text += f", {size_text(int(done.copied_nbytes / done.seconds))}/s"
    return text
