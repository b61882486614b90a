"""`shardckpt convert`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import explaining, print_json, progress, say, size_text


def convert(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A file, folder, run or step of any known form.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The run, folder or file to write.")],
    *,
    to: Annotated[str, typer.Option("--to", help="shardckpt, safetensors, pt or dcp.")] = "shardckpt",
    step: Annotated[int | None, typer.Option("--step", min=0, help="The number that it gets.")] = None,
    part: Annotated[list[str] | None, typer.Option("--part", help="Only this part (again for more).")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="PART=FROM", help="A part it lacks, from there; or rng=seed:N. Repeatable."),
    ] = None,
    memory: Annotated[int, typer.Option("--memory", min=1, help="MiB of tensors in memory at once.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint of another program, or of ours, into another form.

    Read are: safetensors and pytorch_model.bin (one file or with an index), torch.save files, checkpoint folders of
    Trainer, Lightning, fairseq2, torch_checkpointing and DCP, of any number of ranks whose files say how they join, and
    steps of ours. Nothing in them is run. With --add, what a job needs to go
    on and the checkpoint lacks is put beside it, in the new step: from another one, or random streams that begin anew
    with a seed. What is there is never replaced.

    Ends with 0 if it was converted, 1 if what is there is not sound or not there, 2 if it cannot be read or written.

    Example: shardckpt convert llama/ runs/tuned --part model
    """
    with explaining(), progress("step") as bar:
        from shardckpt.tools.convert import convert as move
        from shardckpt.tools.moving.writing.told import Means

        means = Means(budget_nbytes=memory << 20, told=bar)
        added = _added(add or ())
        report = move(source, target, to=to, step=step, parts=part or None, add=added, means=means)
    if as_json:
        print_json(report)
    else:
        what = f"{report.tensors} tensor{'s' * (report.tensors != 1)}, {size_text(report.nbytes)}"
        typer.echo(f"{report.kind}: {what}, {', '.join(report.parts)}; written as {to}, step {report.step}")
    for note in report.notes:
        say(note)


def _added(places: Sequence[str]) -> dict[str, Any]:
    """By part. `ValueError` for what is not written as PART=FROM."""
    added: dict[str, Any] = {}
    for part, _, place in (text.partition("=") for text in places):
        seed = place.removeprefix("seed:") if part == "rng" and place.startswith("seed:") else ""
        if not part or not place or (place.startswith("seed:") and not seed.isdecimal()):
            raise ValueError("--add names a part and where it is: optimizer=old/checkpoint-100, or rng=seed:1")
        if seed:
            from shardckpt.streams import seeded_streams

            added[part] = seeded_streams(int(seed))
        else:
            added[part] = place
    return added
