"""One life of a job, whose ranks are processes that something may end or stop at any moment; and what it must find.

Each life is of its own number, and all that it saves is filled with that number and the step's. What a rank was told to
be committed it writes down at once, so that later lives know of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from shardckpt.testing.gang_acts import mark

RANKS = 3
STEPS = 5
"""That one life saves, if it lasts."""
KEPT = 2
_NUMBERS = 100_000
"""Lives that can be told apart."""


@dataclass(frozen=True)
class Life:
    """What the ranks of a life are told."""

    number: int
    run: Path
    """The root of the checkpoints."""
    notes: Path
    """Where the ranks write down what they were told, and where their marks lie."""
    timeout_s: float
    hasty: bool = False
    """Whether it believes that a step is committed when its save has begun: a bug, which must be found."""
    haunted: bool = False
    """Whether a rank of the life before may commit its step meanwhile."""

    @property
    def marks(self) -> Path:
        return self.notes / f"marks_{self.number}"

    def prepare(self) -> Life:
        self.marks.mkdir(parents=True)
        return self


def state_of(rank: int, step: int, life: int) -> dict[str, Any]:
    """All tensors say of which step and life they are."""
    code = float(step * _NUMBERS + life)
    own = {"shard": torch.full((30_000,), code, dtype=torch.float64), "rank": torch.tensor([rank])}
    return {"model": {"w": torch.full((40_000,), code, dtype=torch.float64)}, "own": own, "life": [life, step]}


def life_of(state: dict[str, Any], rank: int, step: int) -> int:
    """The life that saved this; an error if it is not all of one piece, or of another step or rank."""
    life, saved_step = state["life"]
    want = state_of(rank, step, life)
    pieces = [(state["model"]["w"], want["model"]["w"])]
    pieces += [(state["own"][key], value) for key, value in want["own"].items()]
    if saved_step != step or not all(torch.equal(found, value) for found, value in pieces):
        raise AssertionError(f"step {step} of rank {rank} is torn: {state}")
    return int(life)


def live(rank: int, size: int, folder: Path, life: Life) -> dict[str, Any]:
    """Look at what is there, go on from it, save; what went wrong and when, for those who come to tell of it."""
    torch.set_num_threads(1)
    gangs = sc.Gangs.from_env()
    seen: dict[str, Any] = {"found": {}, "error": None, "at_s": 0.0}
    (life.marks / f"pid_{rank}.new").write_text(str(os.getpid()))
    os.rename(life.marks / f"pid_{rank}.new", life.marks / f"pid_{rank}")
    began = time.monotonic()
    try:
        work(rank, gangs, life, seen)
    except sc.CheckpointError as error:
        seen |= {"error": str(error), "at_s": time.monotonic()}
    finally:
        seen["took_s"] = time.monotonic() - began
        gangs.close()
        mark(life.marks, "ended", rank)
    return seen


def work(rank: int, gangs: sc.Gangs, life: Life, seen: dict[str, Any]) -> None:
    known, gone = promised(life.notes), told(life.notes, "gone")  # before looking: later promises may be newer
    timeout = timedelta(seconds=life.timeout_s)
    with sc.CheckpointManager(life.run, gangs, keep=sc.KeepLast(KEPT), timeout=timeout) as checkpoints:
        seen["found"] = look(checkpoints, rank, known, gone)
        state = state_of(rank, 0, 0)
        resumed = checkpoints.resume(state)
        first = resumed.step if resumed else 1
        newest = max(seen["found"], default=0)
        if resumed is None:
            assert not newest, f"it found step {newest}, and went on from none"
        else:
            if resumed.skipped or resumed.step < newest or (resumed.step > newest and not life.haunted):
                raise AssertionError(f"it went on from step {resumed.step}, past {resumed.skipped}, but found {newest}")
            life_of(state, rank, resumed.step)
        with noted(life, rank, "told") as note, noted(life, rank, "gone") as note_gone:

            def note_pruned(newest: int) -> None:
                for pruned in (known.keys() | set(range(first, newest))).difference(checkpoints.steps()):
                    note_gone(pruned)

            for step in range(first, first + STEPS):  # the one that was resumed from is saved again
                pending = checkpoints.save(step, state_of(rank, step, life.number), replicated=("model",))
                if not life.hasty:
                    pending.result()
                note(step)
                note_pruned(step)
            checkpoints.keep_last_n_checkpoints(1)
            note_pruned(step)


def look(checkpoints: sc.CheckpointManager, rank: int, known: dict[int, int], gone: dict[int, int]) -> dict[int, int]:
    """Every step that is offered, and of which life it is. None may be torn, and none that was promised lost.

    A step that had been pruned may be there again, of an earlier life: a rank that was stopped right before its commit
    has then put there what nobody else had any more. (2026-11-27: this was taken for a loss, in one of 30 zombies.)
    """
    found = {}
    for step in checkpoints.steps():
        state = state_of(rank, 0, 0)
        checkpoints.load(step, state)
        found[step] = life_of(state, rank, step)
    newest = max(known, default=0)
    if newest and newest > max(found, default=0):
        raise AssertionError(f"step {newest} was promised, and these are there: {found}")
    for step, life in found.items():
        if life < known.get(step, 0) > gone.get(step, 0):
            raise AssertionError(f"step {step} of life {known[step]} was promised, and that of life {life} is there")
    return found


@contextmanager
def noted(life: Life, rank: int, what: str) -> Iterator[Any]:
    """Gives a function that writes down, for good, that a step was committed in this life ("told"), or pruned."""
    file = os.open(life.notes / f"{what}_{life.number}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield lambda step: os.write(file, f"{step}\n".encode())
    finally:
        os.close(file)


def promised(notes: Path) -> dict[int, int]:
    """By step, the last life of which any rank was told that it is committed."""
    return told(notes, "told")


def told(notes: Path, what: str) -> dict[int, int]:
    """By step, the last life in which any rank has noted that."""
    known: dict[int, int] = {}
    for file in notes.glob(f"{what}_*"):
        life = int(file.name.split("_")[1])
        for step in map(int, file.read_text().split()):
            known[step] = max(known.get(step, 0), life)
    return known
