"""`shardckpt convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import explaining, print_json, say, size_text


def convert(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A file, folder, run or step of any known form.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The run, folder or file to write.")],
    *,
    to: Annotated[str, typer.Option("--to", help="shardckpt, safetensors, pt or dcp.")] = "shardckpt",
    step: Annotated[int | None, typer.Option("--step", min=0, help="The number that it gets.")] = None,
    from_step: Annotated[int | None, typer.Option("--from-step", min=0, help="Which step to read.")] = None,
    part: Annotated[list[str] | None, typer.Option("--part", help="Only this part (again for more).")] = None,
    memory: Annotated[int, typer.Option("--memory", min=1, help="MiB of tensors in memory at once.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint of another program, or of ours, into another form.

    Read are: safetensors and pytorch_model.bin (one file or with an index), torch.save files, checkpoint folders of
    Trainer, Lightning, fairseq2 and DCP, and steps of ours. Nothing in them is run.

    Ends with 0 if it was converted, 1 if what is there is not sound or not there, 2 if it cannot be read or written.

    Example: shardckpt convert llama/ runs/tuned --part model
    """
    with explaining():
        from shardckpt.tools.convert import convert as move

        report = move(
            source, target, to=to, step=step, from_step=from_step, parts=part or None, budget_nbytes=memory << 20
        )
    if as_json:
        print_json(report)
    else:
        what = f"{report.tensors} tensors, {size_text(report.nbytes)}, {', '.join(report.parts)}"
        typer.echo(f"{report.kind}: {what}; written as {to}, step {report.step}")
    for note in report.notes:
        say(note)
