"""Accelerate: `torchrun --nproc-per-node 2 launch/hf_accelerate.py`, or without torchrun. Stop it, run it again.

Two arguments, if any: where the checkpoints go (a path, or any URL that fsspec opens), and the last step.
"""

import sys

import torch
from accelerate import skip_first_batches
from accelerate.utils import DataLoaderConfiguration

import shardckpt as sc
from shardckpt.integrations.huggingface import Accelerator

root, last_step = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("runs/accelerate", 200)

torch.manual_seed(0)
order = DataLoaderConfiguration(use_seedable_sampler=True)
accelerator = Accelerator(cpu=not torch.accelerator.is_available(), dataloader_config=order, checkpoints=root)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = torch.utils.data.DataLoader(torch.randn(1024, 16), batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
progress = sc.TrainingProgress()
accelerator.register_for_checkpointing(progress)

resumed = accelerator.load_state("auto")  # the newest good step, or None on a fresh start
while progress.step < last_step:
    loader.set_epoch(progress.step // len(loader))
    for inputs in skip_first_batches(loader, progress.step % len(loader)):
        loss = (model(inputs) - inputs.flip(1)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(loss=loss)
        if progress.step % 20 == 0:
            accelerator.save_state(step=progress.step)  # comes back before the state has been written
        if progress.step == last_step:
            break
accelerator.print(f"at step {progress.step}", f"(resumed at {resumed.step})" if resumed else "")
accelerator.end_training()
