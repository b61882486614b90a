"""`shardckpt plan`: what another job would read of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.looking.inspecting import OneStep, WhichStep, many
from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, console, explaining, print_json, say, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from shardckpt.tools.looking.reading import ReadingPlan

_SHOWN = 3
"""Files that are named for a rank."""


def plan(
    url: OneStep,
    *,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", help="Of the job that would load it: dp=4, or dp=2,tp=2. As it was saved if left out."),
    ] = None,
    step: WhichStep = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Only these: 'model.*'. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="But not these. Repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what each rank of a job, on another mesh or on that of the step, would read of it; only the record is read.

    Assumed is what FSDP2 and tensor parallelism do: along tp a tensor lies as it was saved along tp, along replicate
    it is the same everywhere, along any other dimension of the mesh its dimension 0 is cut evenly. What was whole in a
    step with sharded tensors, as buffers are, stays whole; if nothing was sharded, every tensor is cut. Without a model
    there is nothing to compare shapes and names with; `CheckpointManager.plan` does that.

    Ends with 0; 1 if there is no such step or a pattern matches nothing; 2 for wrong usage.

    Example: shardckpt plan s3://lab/runs/a --step 1000 --mesh dp=8 --include model
    """
    with explaining():
        dims = None if mesh is None else _mesh(mesh)
        from shardckpt.tools.looking.reading import plan_reading

        found = plan_reading(url, dims, step=step, include=include or (), exclude=exclude or ())
    if as_json:
        print_json(found, nbytes=found.plan.nbytes)
    else:
        _print(found, console())
    for problem in found.plan.problems:
        say(problem.replace("the state", "the step"))
    if found.plan.problems:
        raise typer.Exit(PROBLEMS)


def _mesh(text: str) -> dict[str, int]:
    """A mesh as it is written: "dp=2,tp=2". `ValueError` for anything else."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name.strip() or not size.strip().isdecimal() for name, _, size in pairs):
        raise ValueError(f"--mesh has dimensions and their sizes, such as dp=2,tp=2; not {text!r}")
    if len({name.strip() for name, _, _ in pairs}) != len(pairs):
        raise ValueError(f"--mesh names a dimension twice: {text!r}")
    return {name.strip(): int(size) for name, _, size in pairs}


def _print(found: ReadingPlan, out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    plan = found.plan
    mesh = ", ".join(f"{name}={size}" for name, size in found.mesh.items())
    out.print(Text(f"step {plan.step}, {size_text(plan.stored_nbytes)}, on {many(len(plan.ranks), 'rank')} ({mesh})"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "reads", "ranges"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for rank in plan.ranks:
        names = [file.file.rpartition("/")[2] for file in rank.files if file.nbytes]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        table.add_row(
            str(rank.rank), size_text(rank.nbytes), str(rank.ranges), f"{', '.join(names[:_SHOWN])}{more}" or "-"
        )
    out.print(table)
    indexes = size_text(sum(rank.index_nbytes for rank in plan.ranks))
    out.print(Text(f"{size_text(plan.nbytes)} of tensors in all, and {indexes} of indexes and nestings"))
    if plan.dropped:
        out.print(Text(f"left out: {many(len(plan.dropped), 'key')} of {len(plan.dropped) + len(plan.changed)}"))
    if found.own:
        shown = f"{', '.join(found.own[:_SHOWN])}{', ...' if len(found.own) > _SHOWN else ''}"
        out.print(Text(f"of single ranks, not for all: {many(len(found.own), 'key')} ({shown}); see new_world"))
