"""What programs leave in which every rank writes a file of its own: real jobs on ranks, saved as those programs do."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed.jobs import Job, Layout, differences, keep_reference

LAYOUTS = {"FSDP2 x TP": Layout(2, 2), "FSDP2": Layout(4), "HSDP": Layout(4, 1, "hsdp"), "TP": Layout(1, 4)}


def trained(layout: Layout, root: Path) -> Job:
    """What it holds lies beside, as torch gathers it."""
    job = Job(layout, seed=0)
    for _ in range(2):
        job.train_step()
    keep_reference(root / "reference.pt", job.gathered())
    return job


def local(state: dict[str, Any]) -> dict[str, Any]:
    """As `fsdp2_local_state_dict` of fairseq2 has it."""
    return {name: v.detach().to_local() if isinstance(v, DTensor) else v.detach() for name, v in state.items()}


def save_items(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    """`<item>_<rank>.pt`, as torch_checkpointing names them."""
    job = trained(layout, root)
    items = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict(), "step": 2}
    items["rng"] = {"torch": torch.get_rng_state() + rank}
    (root / "step").mkdir(exist_ok=True)
    for item, content in items.items():
        torch.save(content, root / "step" / f"{item}_{rank}.pt")


def save_by_torch_checkpointing(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    """By the program itself."""
    job = trained(layout, root)
    tc = importlib.import_module("torch_checkpointing")
    resharder = importlib.import_module("torch_checkpointing.default_resharder").DefaultResharder()
    storage = importlib.import_module("torch_checkpointing.storage.filesystem").LocalFileSystemStorageConfig
    metadata = importlib.import_module("torch_checkpointing.metadata_manager").DefaultMetadataManager
    metadata._all_gather_pickled_data = _gathered  # 2026-11: its own needs a GPU
    logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
    manager = tc.CheckpointManager(
        tc.CheckpointManager.Config(
            items={name: tc.ItemSpec(resharder=resharder) for name in ("model", "optimizer")},
            save=tc.SyncCheckpointSaverConfig(),
            storage_config=storage(use_direct_io=False),
        )
    )
    manager.save(str(root / "step"), {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()})
    manager.close()


def _gathered(self: Any, data: Any, process_group: Any = None) -> dict[int, Any]:
    gathered: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, data, group=process_group)
    return dict(enumerate(gathered))


def save_rank_files(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    """`rank_<r>.pt` and `replicated.pt`, as fairseq2 named them up to 0.4."""
    job = trained(layout, root)
    (step := root / "step_2").mkdir(exist_ok=True)
    state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict(), "model_key": "model"}
    torch.save({**state, "data": {"position": 10 + rank}}, step / f"rank_{rank}.pt")
    if rank == 0:
        torch.save({"epoch": 5, "scheduler": job.scheduler.state_dict()}, step / "replicated.pt")


def save_folders(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    """`model/pp_00/tp_00/sdp_XX.pt` and so on, as fairseq2 0.8.1 writes them: local tensors, other protocols."""
    job = trained(layout, root)
    step, sharded = root / "step_2", Path("pp_00") / "tp_00" / f"sdp_{rank:02}.pt"
    contents: dict[Path, Any] = {
        Path("model") / sharded: local(dict(job.model.named_parameters(remove_duplicate=False))),
        Path("optimizer") / sharded: job.optimizer.state_dict(),
        Path("trainer") / f"rank_{rank:02}.pt": {"_step_nr": 2, "_lr_scheduler": job.scheduler.state_dict()},
        Path("data_reader") / f"dp_{rank:02}.pt": {"position": 10 + rank},
    }
    for path, content in contents.items():
        (step / path.parent).mkdir(parents=True, exist_ok=True)
        torch.save(content, step / path, pickle_protocol=2 if path.parts[0] == "model" else 5)


def resume(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[str]:
    """A job on another mesh goes on from what was converted; what is not as it was."""
    import shardckpt as sc

    job = Job(layout, seed=1)
    policy = sc.LoadPolicy(optimizers="by_number", missing="keep")  # fairseq2's steps here have no buffers
    with sc.CheckpointManager(root / "run", sc.Gangs.from_mesh(job.mesh)) as manager:
        manager.resume({"model": job.module, "optimizer": job.optimizer}, policy=policy)
    found, expected = job.gathered(), torch.load(root / "reference.pt", weights_only=True)
    kept = [f"model {name}" for name, _ in job.model.named_buffers()] if (root / "step_2" / "model").exists() else []
    return [name for name in differences(expected, found) if name.startswith(("model", "moment")) and name not in kept]
