"""A quick look at what saving and loading cost at a place, beside plain writes and reads of the same bytes.

One process, random bytes, by turns. The measurements that are held against other engines are in `benchmarks/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch

from shardckpt.errors import CheckpointLoadError
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.storage.base import Read, Storage
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage
from shardckpt.tools.contents import files_below
from shardckpt.tools.examining.place import leaving_nothing
from shardckpt.tools.examining.rates import forget, random_memory, seconds_of

_TENSORS = 100
_PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Measure:
    """Of one thing that was done several times."""

    name: str
    seconds: tuple[float, ...]
    rate: float
    """Bytes per second, by the median."""
    ratio: float | None = None
    """Its rate, held against that of the plain operation before it."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured."""

    url: str
    """Without credentials."""
    nbytes: int
    measures: tuple[Measure, ...]


def bench(
    url: str | os.PathLike[str],
    *,
    nbytes: int,
    rounds: int = 3,
    storage_options: Mapping[str, object] | None = None,
) -> BenchReport:
    """Save and load so many bytes in a folder of its own, which is gone afterwards. One process, in any one thread.

    Each round writes them once as a plain file and once as a checkpoint, both durable, and reads both: from the device
    where the system can be told to forget them, and checked in the case of the checkpoint. The first save also
    allocates memory; it is not counted.

    `CheckpointError` if it fails, `CheckpointLoadError` if nothing can be put there; `ValueError` or `ImportError` for
    a URL that is none.
    """
    text = os.fspath(url).rstrip("/") or os.fspath(url)
    with closing(open_storage(text, storage_options=storage_options)) as storage:
        try:
            with leaving_nothing(storage) as folder:
                storage.put(f"{folder}/first", [b"1"])
                with closing(open_storage(f"{text}/{folder}", storage_options=storage_options)) as own:
                    seconds = _rounds(own, nbytes, rounds)
        except OSError as error:
            raise CheckpointLoadError(f"cannot write to or read from {redact(text)}: {error}") from error
        return BenchReport(storage.url, nbytes, _measures(seconds, nbytes))


def _rounds(storage: Storage, nbytes: int, rounds: int) -> dict[str, list[float]]:
    content = random_memory(nbytes)
    whole = torch.frombuffer(content, dtype=torch.uint8)
    state: dict[str, Any] = {"model": {f"part_{k}": part for k, part in enumerate(whole.chunk(_TENSORS))}}
    fresh: dict[str, Any] = {"model": {name: torch.zeros_like(part) for name, part in state["model"].items()}}
    target = memoryview(bytearray(nbytes))
    seconds: dict[str, list[float]] = {"plain write": [], "save": [], "plain read": [], "load": []}
    with CheckpointManager(storage, Gangs.local(), timeout=_PATIENCE) as manager:
        for number in range(rounds + 1):
            plain = f"plain-{number}"
            turns: dict[str, Callable[[], object]] = {
                "plain write": partial(storage.put, plain, [content]),
                "save": partial(_save, manager, number, state),
                "plain read": partial(storage.read_into, [Read(plain, 0, target)]),
                "load": partial(manager.load, number, fresh),
            }
            for name, work in turns.items():
                if name == "plain read":
                    for key in files_below(storage, ""):
                        forget(storage, key)
                took = seconds_of(work)
                seconds[name] += [took] if number else []  # the first round warms everything up
            storage.delete([plain])
            storage.delete_tree(f"step_{number}")
    return seconds


def _save(manager: CheckpointManager, step: int, state: Mapping[str, Any]) -> None:
    manager.save(step, state).result(_PATIENCE)


def _measures(seconds: Mapping[str, list[float]], nbytes: int) -> tuple[Measure, ...]:
    rates = {name: nbytes / median(taken) for name, taken in seconds.items()}
    plain = {"save": "plain write", "load": "plain read"}
    ratios = {name: rates[name] / rates[other] for name, other in plain.items()}
    return tuple(Measure(name, tuple(seconds[name]), rates[name], ratios.get(name)) for name in seconds)
