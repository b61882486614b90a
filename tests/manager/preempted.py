"""A training program that only a signal ends; started with torchrun by `test_preempted.py`, in the folder given."""

import itertools
import os
import sys

import torch
import torch.distributed as dist

import shardckpt as sc

LAST_STEP = 1_000_000
"""Which it must not come to."""


def say(text: str) -> None:
    """A line at once: the ranks share one output."""
    os.write(1, f"{text}\n".encode())


dist.init_process_group("gloo")
gangs = sc.Gangs.from_env()
rank = gangs.root.rank
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
with sc.CheckpointManager(sys.argv[1], gangs) as checkpoints:
    checkpoints.stop_on()
    state = {"model": model, "own": {"rank": rank, "step": 0}}
    resumed = checkpoints.resume(state)
    first = resumed.step + 1 if resumed else 1
    for step in itertools.count(first):
        gradient = torch.ones(1)
        dist.all_reduce(gradient)  # a step: the ranks wait for each other, and each of them adds one to the weight
        with torch.no_grad():
            model.weight += gradient
        if step == first + 10:
            say(f"trains {rank} {os.getpid()}")
        stop = checkpoints.should_stop(step)
        if stop or step == LAST_STEP:
            state["own"]["step"] = step
            checkpoints.save(step, state, replicated=("model",))
            break
say(f"ended {rank} {step} {first}")
dist.destroy_process_group()
sys.exit(3 if step == LAST_STEP else 0)
