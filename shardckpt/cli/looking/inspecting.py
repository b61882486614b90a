"""`shardckpt inspect`: what is in a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import PROBLEMS, console, explaining, print_json, say, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from shardckpt.tools.looking.inspect import Inspection

OneStep = Annotated[str, typer.Argument(metavar="URL", help="A run, or one step of it (.../step_100).")]
WhichStep = Annotated[int | None, typer.Option("--step", min=0, help="Which step; the newest if left out.")]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", "-f", help="Only names that match, and what lies below them: 'model.layers.*'. Repeatable."
    ),
]


def inspect(
    url: OneStep,
    *,
    step: WhichStep = None,
    only: Filter = None,
    tree: Annotated[bool, typer.Option("--tree", help="Sizes by module.")] = False,
    depth: Annotated[int | None, typer.Option("--depth", min=0, help="Levels of the tree below the top.")] = None,
    files: Annotated[bool, typer.Option("--files", help="The files and what each rank wrote.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show tensors, files and sizes of a step, from its record and the indexes of its files; no tensor is read.

    Placement: on each dimension of the mesh S(d), cut along dimension d of the tensor, or R, the same everywhere. Tied
    tensors count once. Ends with 0; 1 if there is no such step, nothing matches or an index is lost; 2 for wrong usage.

    Example: shardckpt inspect runs/a --step 1000 --tree --filter 'model.*'
    """
    with explaining():
        from shardckpt.tools.looking.inspect import inspect as look

        found = look(url, step=step, only=only or ())
    if as_json:
        print_json(found, tensor_nbytes=found.tensor_nbytes)
    else:
        _print(found, console(), tree=tree, depth=depth, files=files)
    broken = [file for file in found.files if file.problem]
    for file in broken:
        say(f"{file.name}: {file.problem}; `shardckpt verify` says more")
    if only and not found.tensors and not found.values:
        say(f"nothing in step {found.step} matches {' or '.join(only)}")
        raise typer.Exit(PROBLEMS)
    if broken:
        raise typer.Exit(PROBLEMS)


def _print(found: Inspection, out: Console, *, tree: bool, depth: int | None, files: bool) -> None:
    from rich.text import Text

    mesh = f" ({', '.join(f'{name}={size}' for name, size in found.mesh.items())})" if found.mesh else ""
    ranks = f"{found.world_size} rank{'s' * (found.world_size != 1)}{mesh}"
    only = "; of the model alone" if found.model_only else ""
    out.print(
        Text(f"step {found.step}, {size_text(found.nbytes)} in {many(len(found.files), 'file')}, by {ranks}{only}")
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    created = found.created[:16].replace("T", " ")
    out.print(Text(f"  {created} UTC{f'; {versions}' if versions else ''}"))
    if files:
        _print_files(found, out)
    elif tree:
        _print_tree(found, out, depth)
    else:
        _print_tensors(found, out)
    values = f"{', '.join(found.values[:4])}{', ...' if len(found.values) > 4 else ''}"
    ends = f"; {many(len(found.values), 'value')}: {values}" if found.values else ""
    out.print(Text(f"{many(len(found.tensors), 'tensor')}, {size_text(found.tensor_nbytes)}{ends}"))


def _print_tensors(found: Inspection, out: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for name in ("dtype", "shape", "placement"):
        table.add_column(name, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for line in found.tensors:
        shape = "x".join(map(str, line.shape)) or "()"
        size = f"= {line.tied_to}" if line.tied_to else size_text(line.nbytes)
        table.add_row(line.name, line.dtype, shape, line.placement, size)
    if found.tensors:
        out.print(table)


def _print_tree(found: Inspection, out: Console, depth: int | None) -> None:
    from rich.table import Table

    from shardckpt.tools.looking.inspect import modules

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    for name in ("tensors", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in modules(found.tensors, depth=depth):
        table.add_row("  " * line.depth + line.name.rpartition(".")[2], str(line.tensors), size_text(line.nbytes))
    out.print(table)


def _print_files(found: Inspection, out: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("rank", "size", "tensors", "of tensors"):
        table.add_column(name, justify="right", no_wrap=True)
    for file in found.files:
        name, writer = file.name.removeprefix(f"{found.attempt}/"), str(file.writer)
        tensors = "-" if file.tensors is None else str(file.tensors)
        table.add_row(name, file.kind, writer, size_text(file.nbytes), tensors, size_text(file.tensor_nbytes))
    out.print(table)
    if found.world_size > 1:
        for rank in found.ranks:
            out.print(
                f"rank {rank.rank} (shard {rank.shard}) wrote {many(rank.files, 'file')}, {size_text(rank.nbytes)}"
            )


def many(count: int, what: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count} {what}{'s' * (count != 1)}"
