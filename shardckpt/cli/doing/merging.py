"""`shardckpt merge-lora`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from shardckpt.cli.doing.exporting import say_written
from shardckpt.cli.looking.listing import AsJson
from shardckpt.cli.output import explaining, progress


def merge_lora(
    url: Annotated[str, typer.Argument(metavar="URL", help="A run, or one step of it (.../step_100).")],
    to: Annotated[str, typer.Argument(metavar="TO", help="The folder or file to write; it must not be there yet.")],
    *,
    step: Annotated[int | None, typer.Option("--step", min=0, help="This step; else the newest.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="The adapter_config.json of PEFT; else the step's copy of it.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Its name, if there are several.")] = None,
    form: Annotated[str, typer.Option("--form", help="safetensors or pt.")] = "safetensors",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Round to this, as bfloat16; else as the base.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export the model of a step with its LoRA adapter merged into it, as PEFT's merge_and_unload does. Needs no PEFT.

    The step has the state of a PeftModel, of any mesh. A folder gets what `shardckpt export` writes, under the names of
    the base model. It is there whole, or not at all; what is there already is never replaced.

    Ends with 0 if it was written, 1 if there is no such step or it is damaged, 2 if there is no adapter, it is not one
    that is merged here, or it cannot be read or written.

    Example: shardckpt merge-lora runs/tuned merged --dtype bfloat16
    """
    with explaining(), progress("step") as bar:
        from shardckpt.tools.export import Form
        from shardckpt.tools.merging.lora import merge_lora as write
        from shardckpt.tools.moving.writing.told import Means

        choices: dict[str, Any] = {"step": step, "config": config, "adapter": adapter, "dtype": dtype}
        report = write(url, to, form=cast(Form, form), means=Means(told=bar), **choices)
    say_written(report, as_json=as_json)
