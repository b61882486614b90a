"""Train, save, resume: `torchrun --nproc-per-node 2 launch/train.py`, or without torchrun. Stop it, run it again.

Two arguments, if any: where the checkpoints go (a path, or any URL that fsspec opens), and the last step. Told to stop
(SIGTERM or SIGUSR1, to any rank) it saves the step it is in and ends with status 75: not finished, start it again.
An error that no restart mends (no such bucket, another model) ends torchrun, too; GIVEN_UP may name a file for it.
"""

import os
import sys

import torch
from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from shardckpt.integrations.torchrun import end_torchrun_if_hopeless

end_torchrun_if_hopeless(note=os.environ.get("GIVEN_UP"))
root, last_step = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("runs/tiny", 200)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
gangs = sc.Gangs.from_env()  # one process when not started by torchrun
if gangs.root.size > 1:
    if not is_initialized():  # Ray has done it
        init_process_group("gloo")
    fully_shard(model)
    torch.manual_seed(gangs.root.rank)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, last_step)

with sc.CheckpointManager(root, gangs, keep=sc.KeepLast(3) | sc.KeepBest(1, lower_better=True)) as checkpoints:
    checkpoints.stop_on()  # SIGTERM and SIGUSR1
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": sc.RngState()}
    resumed = checkpoints.resume(state)  # the newest good step, or None on a fresh start
    stop = False
    for step in range(resumed.step + 1 if resumed else 1, last_step + 1):
        inputs = torch.randn(32, 16)
        loss = (model(inputs) - inputs.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        stop = checkpoints.should_stop(step)  # the same on all ranks, wherever the signal came
        if stop or step % 20 == 0:
            checkpoints.save(step, state)  # comes back before the state has been written
            checkpoints.save_score(loss.item(), step=step)
            if gangs.root.rank == 0:
                print(f"step {step} loss {loss:.4f}" + (f" (resumed at {resumed.step})" if resumed else ""), flush=True)
        if stop:
            break

if gangs.root.size > 1:
    destroy_process_group()
if stop and step < last_step:
    sys.exit(os.EX_TEMPFAIL)
