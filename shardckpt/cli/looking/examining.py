"""`shardckpt doctor`, `shardckpt bench` and `shardckpt report`."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated

import typer

from shardckpt.cli.looking.listing import AsJson, Url
from shardckpt.cli.output import PROBLEMS, console, explaining, print_json, print_table, say, size_text

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


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to measure; it need not be there yet.")],
    *,
    mb: Annotated[int, typer.Option("--mb", min=1, help="Megabytes of state.")] = 256,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each is done, after a first time.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Save and load that much at a place, beside a plain write and read of the same bytes.

    One process, random bytes, by turns; it leaves nothing behind. A first impression: what is held against other
    engines, with several ranks, is in benchmarks/.

    Example: shardckpt bench /mnt/scratch --mb 1000
    """
    with explaining():
        from statistics import median

        from shardckpt.tools.examining.bench import bench as measure

        found = measure(url, nbytes=mb * 1_000_000, rounds=rounds)
    if as_json:
        print_json(found)
        return
    rows = []
    for each in found.measures:
        low, middle, high = min(each.seconds), median(each.seconds), max(each.seconds)
        ratio = "" if each.ratio is None else f"{each.ratio:.0%}"
        rate = f"{size_text(int(each.rate))}/s"
        rows.append((each.name, f"{middle:.3f} ({low:.3f}-{high:.3f})", rate, ratio))
    print_table({"what": "left", "seconds": "right", "rate": "right", "of the plain rate": "right"}, rows)


def report(
    url: Url,
    *,
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="Where the page goes; - for stdout.")] = "report.html",
    log: Annotated[str | None, typer.Option("--log", help="What sc.SaveLog wrote; else <run>/saves.jsonl.")] = None,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="Show what this would keep.")] = None,
    keep_best: Annotated[int | None, typer.Option("--keep-best", min=1, help="The same, by score.")] = None,
    lower_better: Annotated[bool, typer.Option("--lower-better", help="Of scores.")] = False,
    png: Annotated[str | None, typer.Option("--png", metavar="FOLDER", help="Pictures of it, by Chromium.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one page of HTML of a run: sizes, timings, each rank's part in a save, space by part, what is kept and why.

    The page needs no network and no other file. Timings come from the log that `sc.SaveLog` writes while training;
    without it they are left out. --png has an installed Chromium take it as a phone and a desk show it, light and dark.

    Ends with 0, or 1 if there is nothing at that place, 2 if it cannot be reached or the page not be written.

    Example: shardckpt report runs/a --to a.html --keep-last 3
    """
    with explaining():
        from shardckpt.run.retention import KeepBest, KeepLast, Policy
        from shardckpt.tools.page.facts import gather, without_phases
        from shardckpt.tools.page.page import page
        from shardckpt.tools.page.pictures import pictures

        rules: list[Policy] = [] if keep_last is None else [KeepLast(keep_last)]
        rules += [] if keep_best is None else [KeepBest(keep_best, lower_better=lower_better)]
        facts = gather(url, log=log, keep=reduce(or_, rules) if rules else None)
        if as_json:
            print_json(without_phases(facts))
        elif to == "-":
            typer.echo(page(facts))
        else:
            with open(to, "w", encoding="utf-8") as file:
                file.write(page(facts))
            say(f"{to} has been written")
        for path in pictures(page(facts), png) if png is not None else ():
            say(f"{path} has been written")
