"""The commands of `shardckpt`, put together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardckpt.cli.doing.converting import convert
from shardckpt.cli.doing.copying import cp
from shardckpt.cli.doing.exporting import average, export
from shardckpt.cli.doing.keeping import pin, prune, runs, unpin
from shardckpt.cli.doing.merging import merge_lora
from shardckpt.cli.doing.repairing import repair
from shardckpt.cli.looking.comparing import diff
from shardckpt.cli.looking.examining import bench, doctor, report
from shardckpt.cli.looking.inspecting import inspect
from shardckpt.cli.looking.listing import ls, verify
from shardckpt.cli.looking.planning import plan
from shardckpt.cli.values import QuickCommand, QuickGroup

app = typer.Typer(
    cls=QuickGroup,
    name="shardckpt",
    help=(
        "Sharded checkpoints for PyTorch: look at them, check, repair, copy and measure them, on paths and URLs.\n\n"
        "Commands end with 0 if all is good, 1 if problems were found or what was asked for is not there, 2 for wrong "
        "usage or a place that cannot be reached, 130 if interrupted. Data goes to stdout, messages to stderr."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"shardckpt {version('shardckpt')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """What comes before the command."""


for command in (
    *(ls, inspect, plan, diff, verify, repair),
    *(convert, export, average, merge_lora, cp, doctor, bench),
    *(report, runs, prune, pin, unpin),
):
    app.command(cls=QuickCommand)(command)


@app.command(
    add_help_option=False,  # the demo tells of its own options
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def demo(context: typer.Context) -> None:
    """Train a small model, kill it in the middle of a save, resume it on other meshes, and compare.

    All arguments go to the demo; `shardckpt demo --help` lists them.

    Example: shardckpt demo --mesh 2x2
    """
    from shardckpt.demo.__main__ import main as run

    sys.exit(run(context.args))
