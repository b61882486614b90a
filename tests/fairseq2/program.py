"""A training program of the examples in the documentation of fairseq2's checkpoint manager (v0.4, basics/ckpt.rst).

The blocks between the lines are theirs, to the letter; only the import and the constructor are ours. Run it under
torchrun, with a root: it goes on where it stopped, saves three times, and leaves what it saw in `seen_<rank>.json`.
"""

# fmt: off
import json
import sys
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, get_rank, get_world_size, init_process_group
from torch.distributed.fsdp import fully_shard

from shardckpt import CheckpointLoadError, CheckpointManager, CheckpointNotFoundError


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """One step on the same data for all ranks; its loss before the step."""
    generator = torch.Generator().manual_seed(epoch)
    inputs = torch.randn(32, 8, generator=generator)
    loss = (model(inputs) - inputs.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
if get_world_size() > 1:
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ckpt_manager = CheckpointManager(Path(sys.argv[1]))
step_nr = 0

# -- "To load the latest checkpoint"
try:
    # Load the last checkpoint
    step_nr, state = ckpt_manager.load_last_checkpoint()

    # Restore model and optimizer state
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])

    print(f"Restored checkpoint from step {step_nr}")
except CheckpointNotFoundError:
    print("No checkpoint found, starting fresh")
# --

restored, losses = step_nr, []
for epoch in range(restored // 1000, restored // 1000 + 2):
    losses.append(train(model, optimizer, epoch))
valid_score = losses[-1]

if restored == 0:
    # -- "The transactional API for saving checkpoints"
    # Begin checkpoint operation
    ckpt_manager.begin_checkpoint(step_nr=1000)

    # Save model and optimizer state
    ckpt_manager.save_state(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step_nr": 1000,
            "epoch": 5
        },
        model_key="model",  # Key for model state in the state dict
        replicated_keys={"epoch"}  # Keys that are same across all processes
    )

    # Save validation score if needed
    ckpt_manager.save_score(valid_score, lower_better=True)  # Optional, lower is better

    # Commit the checkpoint
    ckpt_manager.commit_checkpoint()
    # --

for number in (2000, 3000):
    ckpt_manager.begin_checkpoint(number)
    ckpt_manager.save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    ckpt_manager.save_score(-float(number))
    # -- "For FSDP, the manager provides special handling"
    # Save consolidated (non-sharded) model state
    ckpt_manager.save_consolidated_fsdp_model(model)
    # --
    ckpt_manager.commit_checkpoint()

# -- "Keep Last N Checkpoints", "Keep Best N Checkpoints"
# Keep only the last 5 checkpoints
ckpt_manager.keep_last_n_checkpoints(n=5, preserve_model=False)
# Keep the 3 checkpoints with best validation scores
ckpt_manager.keep_best_n_checkpoints(n=3, preserve_model=False)
# --
kept = ckpt_manager.get_step_numbers()
ckpt_manager.keep_best_n_checkpoints(n=1, preserve_model=True)
ckpt_manager.delete_checkpoint(2000)

told = []
for wanted in (1000, 2000):
    # -- "Example error handling"
    try:
        ckpt_manager.load_checkpoint(step_nr=wanted)
    except CheckpointNotFoundError:
        told.append("Checkpoint not found")
    except CheckpointLoadError as e:
        told.append(f"Error loading checkpoint: {e}")
    # --

ckpt_manager.close()
seen = {"restored": restored, "losses": losses, "kept": kept, "told": told}
Path(sys.argv[1], f"seen_{get_rank()}.json").write_text(json.dumps(seen))
destroy_process_group()
