"""`shardckpt ls` and `shardckpt verify`: they look, and change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.output import (
    PROBLEMS,
    Heads,
    age_text,
    console,
    explaining,
    names_text,
    print_json,
    print_table,
    progress,
    say,
    size_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from shardckpt.tools.listing import Listing, StepLine
    from shardckpt.tools.report import StepReport

Url = Annotated[str, typer.Argument(metavar="URL", help="A run, one step of it (.../step_100), or any folder or file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Data for programs, on stdout.")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Only this step.")]

_MARKS = {"COMPLETE": "green", "PARTIAL": "yellow", "DAMAGED": "bold red"}


def ls(
    url: Url,
    *,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="Only so many steps of the highest numbers; looks at no others.")
    ] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="Also the metrics of each step, by name.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the steps of a run, or the runs below a folder.

    State: committed; model only; damaged record; or, of folders that are never offered for loading, uncommitted,
    replaced (by a later save of the step), set aside (by a repair).

    Example: shardckpt ls s3://lab/runs/7b-a --json
    """
    with explaining():
        from shardckpt.tools.listing import list_checkpoints

        listing = list_checkpoints(url, last=last, metrics=metrics)
    if as_json:
        print_json(listing)
        return
    if not listing.steps and not listing.runs:
        say(f"there are no checkpoints in {listing.url}")
        return
    _print_listing(listing)


def _print_listing(listing: Listing) -> None:
    if listing.runs:
        heads: Heads = {"run": "left", "steps": "right", "latest": "right"}
        print_table(heads, [(run.name, str(run.steps), str(run.latest)) for run in listing.runs])
        return
    metrics = sorted({name for line in listing.steps for name in line.metrics})
    numbers: Heads = dict.fromkeys(("step", "age", "size", "ranks", "score", *metrics), "right")
    print_table(numbers | {"state": "left", "parts": "left"}, [_row(line, metrics) for line in listing.steps])


def _row(line: StepLine, metrics: Sequence[str]) -> tuple[str, ...]:
    values = (line.world_size, line.score, *(line.metrics.get(name) for name in metrics))
    numbers = ["-" if value is None else f"{value:g}" for value in values]
    state = line.state if line.state in ("committed", "model only") else f"{line.state} ({line.folder})"
    step = "-" if line.step is None else str(line.step)
    return step, age_text(line.created), size_text(line.nbytes), *numbers, state, names_text(line.parts)


def verify(
    url: Url,
    *,
    step: Step = None,
    quick: Annotated[bool, typer.Option("--quick", help="Records, presence and sizes only; reads no file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that every byte is what was written, and that all is there that a job needs to go on.

    COMPLETE: sound, with model, optimizer and random states. PARTIAL: sound, but something of these is not in it, or it
    is not committed. DAMAGED: bytes are missing or wrong; each file is named. Checkpoints of other programs are checked
    by the CRCs in their zip archives.

    Ends with 0 if nothing is damaged, 1 if something is (or nothing is there), 2 if the place cannot be reached.

    Example: shardckpt verify runs/a --step 1000
    """
    with explaining(), progress("step") as bar:
        from shardckpt.tools.verify import verify as look

        report = look(url, step=step, quick=quick, told=bar)
    if as_json:
        print_json(report, ok=report.ok)
    else:
        out = console()
        for found in report.steps:
            _print_report(found, out)
    if not report.ok:
        say("damage was found; `shardckpt repair` says what can be done about it")
        raise typer.Exit(PROBLEMS)


def _print_report(report: StepReport, out: Console) -> None:
    from rich.text import Text

    name = f"step {report.step}" if report.step is not None else report.folder or "files"
    where = "" if report.standing == "committed" else f" ({report.standing}: {report.folder or '.'})"
    read = f", {size_text(report.checked_nbytes)} checked" if report.checked_nbytes else ""
    facts = f"  {report.files} file{'s' * (report.files != 1)}, {size_text(report.nbytes)}{read}"
    out.print(Text.assemble((report.verdict, _MARKS[report.verdict]), f"  {name}{where}{facts}"))
    has = [part for part, there in report.parts.items() if there]
    lacks = [part for part, there in report.parts.items() if not there]
    also = f"; also {names_text(report.others)}" if report.others else ""
    out.print(Text(f"  has {', '.join(has) or 'none of the parts'}{also}; without {', '.join(lacks) or 'nothing'}"))
    for problem in report.problems:
        out.print(Text(f"  damaged: {problem}", "red"), soft_wrap=True)
    for note in report.notes:
        out.print(Text(f"  note: {note}"), soft_wrap=True)
