"""A loop with what people put into theirs: torch.compile, mixed precision, accumulation, DDP or FSDP2, a sampler.

    torchrun --nproc-per-node 2 launch/loop.py runs/loop

Kill it and run it again, also with another number of processes: it goes on with the next sample. SIGTERM lets it save
first.
"""

import argparse

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import shardckpt as sc

parser = argparse.ArgumentParser()
parser.add_argument("root", nargs="?", default="runs/loop", help="a path, or any URL that fsspec opens")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--fsdp", action="store_true", help="FSDP2 in place of DDP")
parser.add_argument("--compile", default="inductor", metavar="BACKEND", help="of torch.compile")
options = parser.parse_args()

torch.manual_seed(0)
samples = TensorDataset(torch.randn(88, 16), torch.randint(4, (88,)))
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.1), torch.nn.Tanh(), torch.nn.Linear(64, 4))
gangs = sc.Gangs.from_env()  # one process when not started by torchrun
if gangs.root.size > 1:
    init_process_group("gloo")
    model = fully_shard(model) if options.fsdp else DistributedDataParallel(model)
    torch.manual_seed(gangs.root.rank)
model = torch.compile(model, backend=options.compile)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
sampler = sc.ResumableSampler(samples, gangs, seed=1)  # in place of DistributedSampler
loader = DataLoader(samples, batch_size=8, sampler=sampler)


def batches():
    while True:
        yield from sampler.over(loader)  # what is left of the epoch, then the next one


with sc.CheckpointManager(options.root, gangs, keep=sc.KeepLast(3)) as checkpoints:
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "data": sampler}
    state["rng"] = sc.RngState()
    resumed = checkpoints.resume(state)
    first = resumed.step + 1 if resumed else 1
    schedule = checkpoints.schedule(sc.SaveEvery(steps=5) | sc.SaveEvery(seconds=600), step=first - 1)
    checkpoints.stop_on()
    for step, (inputs, labels) in zip(range(first, options.steps + 1), batches(), strict=False):
        total = 0.0
        for inputs_part, labels_part in zip(inputs.chunk(2), labels.chunk(2), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(inputs_part), labels_part) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        print(f"step {step} loss {total!r}", flush=True)
        stop = checkpoints.should_stop(step)
        if stop or schedule.due(step):
            checkpoints.save(step, state)
        if stop:
            break

if gangs.root.size > 1:
    destroy_process_group()
