"""A training that only a signal ends. `test_preempted.py` has ranks of the pool do it, or starts it with torchrun, in
the folder given."""

import itertools
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import shardckpt as sc

LAST_STEP = 1_000_000
"""Which it must not come to."""


def say(text: str) -> None:
    """A line at once: the ranks share one output."""
    os.write(1, f"{text}\n".encode())


def train(root: str, tell: Callable[[int], None]) -> tuple[int, int]:
    """On every rank, after `init_process_group`; `tell` is called with the rank when it has made a few steps. Gives
    the step that was its last and the first one."""
    gangs = sc.Gangs.from_env()
    rank = gangs.root.rank
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    with sc.CheckpointManager(root, gangs) as checkpoints:
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
                tell(rank)
            stop = checkpoints.should_stop(step)
            if stop or step == LAST_STEP:
                state["own"]["step"] = step
                checkpoints.save(step, state, replicated=("model",))
                break
    return step, first


if __name__ == "__main__":
    dist.init_process_group("gloo")
    last, first = train(sys.argv[1], lambda rank: say(f"trains {rank} {os.getpid()}"))
    say(f"ended {dist.get_rank()} {last} {first}")
    dist.destroy_process_group()
    sys.exit(3 if last == LAST_STEP else 0)
