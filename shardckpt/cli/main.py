"""The `shardckpt` command and its sub-commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardckpt.cli.inspecting import inspect
from shardckpt.cli.looking import ls, verify
from shardckpt.cli.planning import plan
from shardckpt.cli.repairing import repair

app = typer.Typer(
    name="shardckpt",
    help="Sharded checkpoints for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of `shardckpt` and of `python -m shardckpt`."""
    app(prog_name="shardckpt")


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


app.command()(ls)
app.command()(inspect)
app.command()(plan)
app.command()(verify)
app.command()(repair)


@app.command(
    add_help_option=False,  # the demo tells of its own options
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def demo(context: typer.Context) -> None:
    """Train a small model, kill it in the middle of a save, resume it on other meshes, and compare.

    All arguments go to the demo; `shardckpt demo --help` lists them.
    """
    from shardckpt.demo.__main__ import main as run

    sys.exit(run(context.args))
