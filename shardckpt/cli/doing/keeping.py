"""`shardckpt runs`, `prune`, `pin`, `unpin`: many checkpoints, and which of them stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, age_text, console, explaining, print_json, say, size_text

if TYPE_CHECKING:
    from shardckpt.run.registry.summary import RunSummary
    from shardckpt.run.retention import Policy

Url = Annotated[str, typer.Argument(metavar="URL", help="The run.")]


def runs(
    url: Annotated[str, typer.Argument(metavar="URL", help="The folder that the runs are in.")],
    *,
    best: Annotated[str | None, typer.Option("--best", help="Also the best step of each, by this metric.")] = None,
    lower_better: Annotated[bool, typer.Option("--lower-better", help="Less of it is better.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs that `Runs` has made below a folder, with their steps, code and configuration.

    With --best also the step of each, of those that are there, that is the best by this metric (or by the score), and
    its value. With --json all metrics of all steps are there, and the configurations.

    Ends with 0, or 1 if there is none.

    Example: shardckpt runs checkpoints
    """
    with explaining():
        from shardckpt.gang.gangs import Gangs
        from shardckpt.run.registry.runs import Runs
        from shardckpt.run.registry.summary import RunsFound

        if not url:
            raise ValueError("an empty path is no place: use '.' for the current folder")

        with Runs(url, Gangs.local()) as place:
            found = place.list()
    if as_json:
        print_json(RunsFound(tuple(found)))
    elif found:
        _print_runs(found, best, lower_better=lower_better)
    if not found:
        say("there are no runs here; `shardckpt ls` lists folders of steps that have other names")
        raise typer.Exit(PROBLEMS)


def _print_runs(found: list[RunSummary], metric: str | None, *, lower_better: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    of_best = () if metric is None else ("best", metric)
    for name in ("run", "name", "age", "steps", "latest", *of_best, "saved", "ranks", "host", "code"):
        table.add_column(name, justify="left" if name in ("run", "name", "host", "code") else "right", overflow="fold")
    for run in found:
        saved = run.best(metric, lower_better=lower_better) if metric is not None else None
        best: tuple[str, ...] = ("-",) * len(of_best)
        if saved is not None and metric is not None:
            best = (str(saved.step), f"{saved.metrics[metric]:g}")
        steps = (str(len(run.steps)), str(run.steps[-1]) if run.steps else "-")
        if run.info is None:
            table.add_row(run.folder, "(its run.json is damaged)", "-", *steps, *best, "-", "-", "-", "-")
            continue
        info, code = run.info, run.info.code
        commit = "-" if code is None else code.commit[:10] + (" + changes" if code.dirty else "")
        where = info.sessions[-1].host if info.sessions else "-"
        facts = (str(len(info.history)), str(info.world_size), where, commit)
        table.add_row(run.folder, info.name or "-", age_text(info.created), *steps, *best, *facts)
    console().print(table)


def prune(
    url: Url,
    *,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="The last N steps stay.")] = None,
    keep_best: Annotated[int | None, typer.Option("--keep-best", min=1, help="The best N steps stay.")] = None,
    metric: Annotated[str, typer.Option("--metric", help="What the best are best by.")] = "score",
    lower_better: Annotated[bool, typer.Option("--lower-better", help="Less of it is better.")] = False,
    keep_every: Annotated[int | None, typer.Option("--keep-every", min=1, help="Multiples of N stay.")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", "--yes", help="Do it. Without this, only say what would be done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the steps that no rule keeps. A dry run, with the reason for each step, unless --apply is given.

    Whatever the rules say, the last step, the best one, pinned ones, and the newest that a job can go on from stay. A
    step whose record is damaged is left to `shardckpt repair`. Nobody may be saving one of the steps meanwhile.

    Ends with 0 if nothing is left to be deleted, 1 if something is, 2 for wrong usage.

    Example: shardckpt prune runs/a --keep-last 3 --keep-best 1 --lower-better --apply
    """
    with explaining():
        from shardckpt.run.catalog import Catalog
        from shardckpt.run.keeping.links import sweep_links
        from shardckpt.run.prune import Deleted, PruneReport, fates, plan_retention, retain
        from shardckpt.run.retention import KeepBest
        from shardckpt.run.shared.sweeping import tidy_blobs
        from shardckpt.storage.open import open_storage
        from shardckpt.tools.place import check_is_there

        policy = _policy(keep_last, keep_best, keep_every, metric=metric, lower_better=lower_better)
        storage = open_storage(url)
        try:
            catalog = Catalog(storage)
            best_by = KeepBest(1, lower_better=lower_better, metric=metric)
            told = fates(plan_retention(catalog, policy, best_by=best_by), policy)
            deleted: list[Deleted] = retain(catalog, policy, best_by=best_by) if apply else []
            if deleted:
                sweep_links(catalog)
            if apply:
                tidy_blobs(storage)  # also of what was deleted long ago, and of saves that died
        finally:
            storage.close()
        if not told:
            check_is_there(url)
            say(f"there are no committed steps in {storage.url}")
    gone = {one.step: one.nbytes for one in deleted}
    left = [fate.step for fate in told if not fate.kept and fate.step not in gone]
    if as_json:
        print_json(PruneReport(tuple(told), tuple(deleted), apply))
    else:
        for fate in told:
            word = "keep" if fate.kept else "deleted" if fate.step in gone else "delete"
            typer.echo(f"{word:8}step {fate.step}: {fate.reason}")
        if gone:
            typer.echo(f"{len(gone)} step{'s' * (len(gone) != 1)} deleted, {size_text(sum(gone.values()))}")
    if left:
        say("these steps were left, for their records are damaged" if apply else "nothing was changed; --apply does it")
        raise typer.Exit(PROBLEMS)


def _policy(last: int | None, best: int | None, every: int | None, *, metric: str, lower_better: bool) -> Policy:
    from shardckpt.run.retention import KeepAny, KeepBest, KeepEvery, KeepLast

    rules: list[Policy] = [KeepLast(last)] if last is not None else []
    rules += [KeepBest(best, lower_better=lower_better, metric=metric)] if best is not None else []
    rules += [KeepEvery(steps=every)] if every is not None else []
    if not rules:
        raise ValueError("say what is to stay: --keep-last N, --keep-best N or --keep-every N")
    return rules[0] if len(rules) == 1 else KeepAny(tuple(rules))


def pin(url: Url, *, step: Annotated[int, typer.Option("--step", min=0, help="Which step.")]) -> None:
    """Keep a step whatever a policy says, of `prune` or of a job that works on the run.

    Example: shardckpt pin runs/a --step 1000
    """
    with explaining():
        from shardckpt.run.catalog import Catalog
        from shardckpt.run.keeping.pins import pin as put
        from shardckpt.storage.open import open_storage

        storage = open_storage(url)
        try:
            put(Catalog(storage), step)
        finally:
            storage.close()
    typer.echo(f"step {step} is pinned")


def unpin(url: Url, *, step: Annotated[int, typer.Option("--step", min=0, help="Which step.")]) -> None:
    """Take the pin of a step away.

    Ends with 0, or 1 if it was not pinned.

    Example: shardckpt unpin runs/a --step 1000
    """
    with explaining():
        from shardckpt.run.keeping.pins import pinned_steps
        from shardckpt.run.keeping.pins import unpin as take
        from shardckpt.storage.open import open_storage

        storage = open_storage(url)
        try:
            was = step in pinned_steps(storage)
            take(storage, step)
        finally:
            storage.close()
    typer.echo(f"step {step} is no longer pinned" if was else f"step {step} was not pinned")
    if not was:
        raise typer.Exit(PROBLEMS)
