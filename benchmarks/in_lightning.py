"""`python -m benchmarks.in_lightning`: what saving costs a training of Lightning, with `ModelCheckpoint` and with ours.

Training without saves, and with one every few steps, take turns: each in a process of its own, forked from one that has
imported Lightning. What is on no device when training ends is synced then, and that counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

KINDS = ("no saves", "shardckpt", "ModelCheckpoint", "ModelCheckpoint, AsyncCheckpointIO", "ModelCheckpoint, our IO")
_WIDTH = 1024


def train(kind: str, root: Path, *, gb: float, saves: int, every: int) -> dict[str, Any]:
    """Seconds: of all steps until everything is on the device, of each call of the callback, of each step."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    from shardckpt.integrations.lightning import checkpoint_io, checkpoints

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            layers = max(1, round(gb * 1e9 / (12 * _WIDTH * _WIDTH)))  # a weight and its two moments, float32
            self.net = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))

        def training_step(self, batch: Any) -> torch.Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.at.append(time.perf_counter())

        def on_train_batch_end(self, *_: Any) -> None:
            self.at.append(time.perf_counter())

    callback = ModelCheckpoint(root, every_n_train_steps=every, save_top_k=1)
    callback = checkpoints(callback) if kind == "shardckpt" else callback
    stalls: list[float] = []
    callback.on_train_batch_end = partial(_timed, callback.on_train_batch_end, stalls)
    io = AsyncCheckpointIO() if "Async" in kind else checkpoint_io() if "our IO" in kind else None
    steps, clock = every * saves + every // 2, Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[clock, *([] if kind == "no saves" else [callback])],
        plugins=io,
        enable_checkpointing=kind != "no saves",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(8 * steps, _WIDTH)), batch_size=8))
    _sync(root)
    total = time.perf_counter() - clock.at[0]
    took = [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)]
    return {"total": total, "stalls": stalls[every - 1 :: every], "step": statistics.median(took)}


def _timed(hook: Callable[..., None], stalls: list[float], *given: Any) -> None:
    began = time.perf_counter()
    hook(*given)
    stalls.append(time.perf_counter() - began)


def _sync(root: Path) -> None:
    """What was synced before costs nothing."""
    for folder, _, names in os.walk(root):
        for name in (".", *names):
            descriptor = os.open(Path(folder, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def in_a_fork(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, from a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(act()).encode())
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    if not content:
        raise RuntimeError("a training did not come to its end; see above")
    return dict(json.loads(content))


def table(found: dict[str, list[dict[str, Any]]], *, saves: int) -> str:
    """Medians with the smallest and largest sample."""
    bare = statistics.median(one["total"] for one in found["no saves"])
    lines = [
        "| | a save holds the training up, ms | training lost until it is durable, each save, s | all of it, s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind, results in found.items():
        stalls = [1e3 * stall for one in results for stall in one["stalls"][1:]]
        lost = [(one["total"] - bare) / saves for one in results]
        held = _span(stalls, "{:.0f}") if stalls else ""
        totals = _span([one["total"] for one in results], "{:.2f}")
        lines.append(f"| {kind} | {held} | {_span(lost, '{:.2f}') if stalls else ''} | {totals} |")
    return "\n".join(lines)


def _span(samples: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(value) for value in (min(samples), statistics.median(samples), max(samples)))
    return f"{middle} ({low}-{high})"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_lightning", description=__doc__)
    parser.add_argument("--gb", type=float, default=0.5, help="of parameters and their moments (default: 0.5)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=4, help="of each training; the first is left out of the stalls")
    parser.add_argument("--every", type=int, default=6, metavar="STEPS")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    given = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("no saves", *given.kinds)}
    warnings.simplefilter("ignore")
    __import__("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for number in range(given.rounds):
        for kind in list(found)[:: 1 if number % 2 == 0 else -1]:
            root = Path(tempfile.mkdtemp(prefix="lightning-", dir=given.root))
            try:
                terms = {"gb": given.gb, "saves": given.saves, "every": given.every}
                found[kind].append(in_a_fork(partial(train, kind, root, **terms)))
            finally:
                shutil.rmtree(root, ignore_errors=True)
    step = statistics.median(one["step"] for one in found["no saves"])
    print(f"{given.gb:g} GB of state, {given.saves} saves, {given.rounds} rounds; a step takes {step:.2f} s\n")
    print(table(found, saves=given.saves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
