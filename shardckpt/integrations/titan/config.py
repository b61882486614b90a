"""What a trainer of torchtitan's style says of its checkpoints, by the names that it has there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

AsyncMode = Literal["disabled", "async", "async_with_pinned_mem"]


@dataclass(kw_only=True)
class CheckpointConfig:
    """For trainers without torchtitan; its own config has the same names."""

    enable: bool = True
    folder: str = "checkpoint"
    """Below the `base_folder` of the checkpointer; or a path or URL of its own."""
    interval: int = 500
    """Steps from save to save."""
    async_mode: AsyncMode = "async"
    """"disabled": a save returns when it is committed. The other two are one here: it returns when what training may
    change next is safe, and optimizers wait, by themselves, for the rest of the copy."""
    keep_latest_k: int = 10
    """How many of the newest steps stay; all, if 0."""
    initial_load_path: str | None = None
    """A run or a step, loaded where the folder has no step; with `initial_load_in_hf` a folder of safetensors."""
    initial_load_model_only: bool = True
    initial_load_in_hf: bool = False
    initial_load_in_hf_quantized: bool = False
    last_save_model_only: bool = True
    """Of the last step only the model is saved. It is not resumed from."""
    last_save_in_hf: bool = False
    """It is exported as safetensors, too, with the names that the adapter gives, into `step_<n>_hf` of the folder."""
    export_dtype: str = "float32"
    """What the last save's floating-point tensors are converted to, if it is of the model alone."""
    exclude_from_loading: Sequence[str] = ()
    """Keys of the state, such as "dataloader", that a resume leaves as they are."""
    enable_first_step_checkpoint: bool = False
    load_only: bool = False
    """Nothing is saved."""


def check(config: Any) -> None:
    """`ValueError` for a config that says nothing that could be done."""
    mode = getattr(config, "async_mode", "async")
    if mode.lower() not in get_args(AsyncMode):
        raise ValueError(f"async_mode is one of {', '.join(get_args(AsyncMode))}, not {mode!r}")
    if config.interval < 1 or config.keep_latest_k < 0:
        raise ValueError("interval is 1 or more, and keep_latest_k 0 or more")
    if config.last_save_in_hf and not config.last_save_model_only:
        raise ValueError("last_save_in_hf is for the model alone: set last_save_model_only")
    if config.initial_load_in_hf and not config.initial_load_model_only:
        raise ValueError("initial_load_in_hf is for the model alone: set initial_load_model_only")
    if "model" in config.exclude_from_loading:
        raise ValueError("the model cannot be excluded from loading")
