"""`shardckpt export` and `shardckpt average`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import explaining, print_json, progress, say, size_text

if TYPE_CHECKING:
    from shardckpt.gang.gangs import Gangs
    from shardckpt.tools.export import ExportReport

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def export(
    url: Annotated[str, typer.Argument(metavar="URL", help="A run, or one step of it (.../step_100).")],
    to: Annotated[str, typer.Argument(metavar="TO", help="The folder or file to write; it must not be there yet.")],
    *,
    step: Annotated[int | None, typer.Option("--step", min=0, help="This step; else the newest.")] = None,
    form: Annotated[str, typer.Option("--form", help="safetensors or pt.")] = "safetensors",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Round to this, as bfloat16; else as it is.")] = None,
    max_file_size: Annotated[str | None, typer.Option("--max-file-size", help="Of safetensors, as 5GB.")] = None,
    part: Annotated[str, typer.Option("--part", help="The part of the state.")] = "model",
    as_json: AsJson = False,
) -> None:
    """Export the model of a committed step, of any mesh, as consolidated safetensors or one .pt file.

    A folder gets model.safetensors, or several files with an index, and config.json and the tokenizer's files if the
    step has them from cc/. It is there whole, or not at all; what is there already is never replaced.

    Under torchrun all of its processes do it together, each a part of the files (torchrun --nproc-per-node 8 -m
    shardckpt export ...), and rank 0 says what was done.

    Ends with 0 if it was exported, 1 if there is no such step or it is damaged, 2 if it cannot be read or written.

    Example: shardckpt export s3://lab/runs/a llama-7b-a --dtype bfloat16
    """
    with explaining(), _ranks() as gangs, progress("step") as bar:
        from shardckpt.tools.export import Form
        from shardckpt.tools.export import export as write
        from shardckpt.tools.moving.writing.told import Means

        most = None if max_file_size is None else size_of(max_file_size)
        choices: dict[str, Any] = {"step": step, "dtype": dtype, "max_file_nbytes": most, "part": part}
        report = write(url, to, form=cast(Form, form), means=Means(told=bar, gangs=gangs), **choices)
        is_first = gangs is None or gangs.root.rank == 0
    if not is_first:
        return
    say_written(report, as_json=as_json)


def say_written(report: ExportReport, *, as_json: bool) -> None:
    """What was exported, on stdout, and what somebody should know of it, on stderr."""
    if as_json:
        print_json(report)
    else:
        beside = f", with {', '.join(report.copied)}" if report.copied else ""
        what = f"{report.tensors} tensor{'s' * (report.tensors != 1)}, {size_text(report.nbytes)}"
        typer.echo(f"step {report.step}: {what}, written as {report.form}{beside}")
    for note in report.notes:
        say(note)


@contextmanager
def _ranks() -> Iterator[Gangs | None]:
    """Those that torchrun has started to do this together; None if it has not. (Other launchers set RANK for programs
    beside which somebody may well call this.)"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield None
        return
    from shardckpt.gang.gangs import Gangs

    gangs = Gangs.from_env()
    try:
        yield gangs
    finally:
        gangs.close()


def average(
    sources: Annotated[
        list[str], typer.Argument(metavar="FROM...", help="Steps (.../step_100), or runs: their newest.")
    ],
    to: Annotated[str, typer.Argument(metavar="TO", help="The run, folder or file to write.")],
    *,
    weights: Annotated[str | None, typer.Option("--weights", help="One for each, as 1,1,2; else all alike.")] = None,
    decay: Annotated[float | None, typer.Option("--decay", help="A moving average in this order instead.")] = None,
    integers: Annotated[str, typer.Option("--integers", help="equal: they must be; last: the last one's.")] = "equal",
    form: Annotated[str, typer.Option("--form", help="shardckpt, safetensors or pt.")] = "shardckpt",
    step: Annotated[int | None, typer.Option("--step", min=0, help="The number that it gets; else the last's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Average the models of several steps, tensor by tensor, into a new step or into files.

    It is calculated in float32 (float64 for float64), and dtypes stay as they are. The steps may be of any meshes, and
    lie in any places, but must have the same tensors; so may files and folders of other programs that `convert` reads.

    Ends with 0 if it was written, 1 if a step is not there or is damaged, 2 if they do not fit or it cannot be written.

    Example: shardckpt average runs/a/step_100 runs/a/step_200 averaged --form safetensors
    """
    with explaining(), progress("step") as bar:
        from shardckpt.tools.average import average as write
        from shardckpt.tools.moving.writing.told import Means

        shares = None if weights is None else [float(text) for text in weights.split(",")]
        choices: dict[str, Any] = {"integers": integers, "form": form, "step": step, "decay": decay}
        report = write(sources, to, weights=shares, means=Means(told=bar), **choices)
    if as_json:
        print_json(report)
    else:
        what = f"{report.tensors} tensor{'s' * (report.tensors != 1)}, {size_text(report.nbytes)}"
        typer.echo(f"{what}, written as {report.form}, step {report.step}")
        for source, share in zip(report.sources, report.weights, strict=True):
            typer.echo(f"{share:7.2%}  {source}")


def size_of(text: str) -> int:
    """Bytes, from "800MB", "5 GiB" or a number. `ValueError` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write it as 800MB, 5GB or 5GiB")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _UNITS[unit[:1]])
