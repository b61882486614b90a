"""What commands print: data on stdout, messages on stderr, and with which status they end.

0: good. 1: problems were found, or what was asked for is not there. 2: wrong usage, or a place that cannot be reached.
130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import typer

from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from shardckpt.tools.examining.findings import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

GOOD, PROBLEMS, UNUSABLE = 0, 1, 2

_MOST_NAMES = 12
"""Of parts, in a line for people; JSON has all."""

MOMENT_S = 0.5
"""What is over by then shows no bar."""

Side: TypeAlias = Literal["left", "right"]
Heads: TypeAlias = dict[str, Side]
"""The names of columns, and to which side each stands."""

_MANY = 1000
"""Rows beyond which a table is not laid out for the terminal: rich takes half a millisecond for each."""
_WIDE = 1000
"""Columns for output that goes to a file or another program: nothing is cut off or wrapped."""


def console() -> Console:
    """Of stdout. Colours on terminals only, and never with NO_COLOR; as wide as the terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, emoji=False, markup=False)


def print_table(heads: Heads, rows: Sequence[Sequence[str]]) -> None:
    """On terminals, what is too wide is folded in the columns that stand to the left."""
    if sys.stdout.isatty() and len(rows) <= _MANY:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, side in heads.items():
            table.add_column(name, justify=side, no_wrap=side == "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console().print(table)
        return
    columns = [[name, *(row[k] for row in rows)] for k, name in enumerate(heads)]
    padded = [_padded(column, side) for column, side in zip(columns, heads.values(), strict=True)]
    typer.echo("\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True)))


def _padded(column: list[str], side: Side) -> list[str]:
    width = max(map(len, column))
    return [text.rjust(width) if side == "right" else text.ljust(width) for text in column]


def say(message: str) -> None:
    """A line for people, on stderr."""
    typer.echo(message, err=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr, on terminals only, and if it takes longer than a moment. Call it, in any thread, with the number
    of what is under way (a step, ...), how many bytes of it have just been done, and how many it has; one is done after
    the other."""
    if not sys.stderr.isatty():
        yield lambda part, nbytes, total: None
        return
    from rich import progress as parts
    from rich.console import Console

    amounts = (parts.DownloadColumn(), parts.TransferSpeedColumn(), parts.TimeRemainingColumn())
    columns = (parts.TextColumn("{task.description}"), parts.BarColumn(), *amounts)
    tasks, lock, began = dict[int, parts.TaskID](), Lock(), monotonic()
    bar = parts.Progress(*columns, console=Console(stderr=True), transient=True)

    def advance(part: int, nbytes: int, total: int) -> None:
        with lock:
            if part not in tasks:
                for task in [*tasks.values()]:  # of thousands of steps, only the one that is under way has a line
                    bar.remove_task(task)
                tasks.clear()
                tasks[part] = bar.add_task(f"{what} {part}", total=total)
            bar.advance(tasks[part], nbytes)
            if not bar.live.is_started and monotonic() - began > MOMENT_S:
                bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def print_json(content: Any, **more: Any) -> None:
    """A dataclass as JSON, with further entries; keys are the names of its fields."""
    entries: Mapping[str, Any] = asdict(content) if is_dataclass(content) and not isinstance(content, type) else content
    typer.echo(json.dumps({**entries, **more}, indent=2))


@contextmanager
def explaining() -> Iterator[None]:
    """Errors that a person can do something about end the command with one message, and no traceback."""
    try:
        yield
    except (CheckpointNotFoundError, CheckpointDamagedError) as error:
        say(str(error))
        raise typer.Exit(PROBLEMS) from None
    except (CheckpointError, OSError, ValueError, ImportError) as error:
        say(f"shardckpt: {error}")
        raise typer.Exit(UNUSABLE) from None


def size_text(nbytes: int | None) -> str:
    """Bytes for people: "1.5 GB"."""
    return "-" if nbytes is None else bytes_text(nbytes)


def names_text(names: Sequence[str]) -> str:
    """ "a, b, c"; of very many the first ones, and how many there are besides: a flat state may have thousands."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def age_text(created: str | None, now: datetime | None = None) -> str:
    """How long ago that was, for people: "3 min", "2 h", "5 d"."""
    if created is None:
        return "-"
    try:
        then = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return "-"
    seconds = ((now or datetime.now(timezone.utc)) - then.astimezone(timezone.utc)).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
