"""Merge a LoRA adapter of PEFT into its base, and write the merged model. One process, no group, no PEFT."""

from __future__ import annotations

from dataclasses import replace

from shardckpt.errors import InvalidStateError
from shardckpt.tools.export import ExportReport, Form, Wish, beside, opened, options_of, written
from shardckpt.tools.merging.config import ADAPTER_CONFIG, Given, lora_config, parsed
from shardckpt.tools.merging.source import MergedSource
from shardckpt.tools.moving.writing.told import Means
from shardckpt.tools.place import Where

_PART = "model"
_WIDER = 8
"""What is read at once needs memory as it is, in the dtype of the adapter, scaled, and turned over."""


def merge_lora(
    url: Where,
    to: Where,
    *,
    step: int | None = None,
    config: Given | None = None,
    adapter: str | None = None,
    form: Form = "safetensors",
    dtype: str | None = None,
    means: Means | None = None,
) -> ExportReport:
    """Write the model of a committed step with its LoRA adapter merged into it: `W + scale * B @ A`, as PEFT's
    `merge_and_unload` calculates it, under the names of the base model, as `export` writes it.

    The step has the state of a `PeftModel` as its "model", of any mesh, with its base stored once per run or not. It is
    gone through tensor by tensor, in bounded pieces. What comes out is bit for bit what PEFT makes of it on a CPU,
    unless a product is rounded otherwise in parts than as a whole (`MergedSource`).

    Linear layers, `Conv1D` of transformers, embeddings and convolutions are merged, with `use_rslora`, patterns of
    ranks and alphas, `lora_bias` and `modules_to_save`. `InvalidStateError` for all other adapters (DoRA, ...), for a
    model without one, for a configuration that is not the adapter's, for a base that is quantized, and for a weight
    that is tied to another; else as `export`.

    Args:
        url: a run or a step; a path, URL or `Storage`.
        to: a folder that is not there yet, or a file (`*.safetensors`; `*.pt`, `*.bin`).
        step: which of the run; if not given, the newest.
        config: what PEFT calls `adapter_config.json`: the file, its folder, or its content (`peft_config.to_dict()`).
            If not given, the copy of `cc/` that the step has.
        adapter: its name, where there are several.
        form: "safetensors" or "pt", as of `export`.
        dtype: the merged model is rounded to this; if not given, to what the base has.
        means: memory, storage options, who hears of progress.
    """
    means = means or Means()
    wish = Wish(to, form, dtype, options_of(form), _PART, replace(means, budget_nbytes=means.budget_nbytes // _WIDER))
    with opened(url, step, wish) as own:
        others = dict(beside(own))
        said = others.pop(ADAPTER_CONFIG, None)  # beside a merged model it would have the adapter looked for
        if config is None:
            if said is None:
                raise InvalidStateError(
                    f"step {own.manifest.step} at {own.url} has no copy of {ADAPTER_CONFIG} (put it into cc/ of the "
                    "run): give it as config, or with --config"
                )
            config = parsed(said, ADAPTER_CONFIG)
        merged = MergedSource(own, lora_config(config), part=_PART, adapter=adapter)
        report = written(own, wish, others, made=merged)
        weights, name = len(merged.named.weights), merged.named.adapter
        note = f"the adapter {name!r} was merged into {weights} tensor{'s' * (weights != 1)}"
        return replace(report, notes=(note, *report.notes))
