"""The model by the names of Hugging Face, through torchtitan's adapter: out as safetensors, and in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import nn

from shardckpt.errors import InvalidOperationError
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.talk import Talk
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage
from shardckpt.tools.export import export

_log = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)


def export_with(adapter: Any, model: Mapping[str, Any], *, step: int, folder: str, gangs: Gangs) -> str:
    """Write the model, of which each rank has its shards, as safetensors that `from_pretrained` opens. By all ranks;
    no rank holds the whole model. Gives the folder; when this returns it is there, whole.

    The shards go into a run of their own first, by their new names, and rank 0 joins them file by file.
    """
    shards = f"{folder.rstrip('/')}/step_{step}_shards"

    def join() -> str:
        target = f"{folder.rstrip('/')}/{_free(folder, f'step_{step}_hf')}"
        export(shards, target, step=step)
        return target

    with torch.no_grad():
        renamed = adapter.to_hf(dict(model))
    with CheckpointManager(shards, gangs, timeout=_TIMEOUT) as checkpoints:
        checkpoints.save(step, {"model": renamed}).result()
        with closing(Talk(gangs.fork("export").root, timeout=_TIMEOUT)) as talk:
            talk.enter("export", step=step)
            target = str(talk.from_rank_0(join, "export to safetensors", step=step))
        checkpoints.delete_checkpoint(step)
    if gangs.root.rank == 0:
        _log.info("step %d is exported to %s", step, redact(target))
    return target


def _free(folder: str, name: str) -> str:
    """What an earlier end of this run has exported stays: then a number follows."""
    storage = open_storage(folder)
    try:
        there = {entry.rstrip("/") for entry in storage.list()}
    finally:
        storage.close()
    return next(free for n in count(1) if (free := name if n == 1 else f"{name}_{n}") not in there)


def load_from_hub(adapter: Any, module: nn.Module, path: str | None, *, quantized: bool) -> None:
    """Fill the model from a folder of safetensors, as torchtitan does at the start: each rank reads its shards."""
    import torch.distributed.checkpoint as dcp

    if adapter is None or not path:
        raise InvalidOperationError(
            "initial_load_in_hf needs an adapter for the names of the model, and a folder: give sd_adapter and "
            "initial_load_path"
        )
    renamed = adapter.to_hf(module.state_dict())
    dcp.load(  # type: ignore[attr-defined]
        renamed, storage_reader=adapter.get_hf_storage_reader(path, quantized)
    )
    with torch.no_grad():
        own = module.state_dict()
        for name, value in adapter.from_hf(renamed).items():
            own[name].copy_(value)
