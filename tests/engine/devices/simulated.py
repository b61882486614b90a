"""A device whose streams are queues: what is queued is done late, in any order that the waits in it allow.

Its tensors are the host's, which are named to it. Nothing is done but where somebody waits, or by chance when something
is queued; so a copy that is not ordered against training's kernels meets the wrong values soon.
"""

from __future__ import annotations

import errno
import mmap
import random
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Queue = deque[tuple[str, Any]]


@dataclass(eq=False)
class SimulatedMark:
    device: SimulatedDevices
    reached: bool = False

    def wait(self) -> None:
        if not self.reached:
            self.device.waits.append(threading.current_thread().name)
        self.device.work_until(lambda: self.reached)


@dataclass
class SimulatedDevices:
    """All devices of a process; a tensor lies on the place that it was put on."""

    seed: int = 0
    refusal: str | None = None
    """Why no memory can be page-locked."""
    places: dict[int, Hashable] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)
    """The threads that have waited for a mark, when it was not reached yet."""
    locks: list[int] = field(default_factory=list)
    """Bytes of each memory that was page-locked, in order."""
    unlocks: int = 0
    queued_copies: int = 0

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._guard = threading.RLock()
        self._queues: dict[tuple[Hashable, str], Queue] = {}

    def put(self, tensor: torch.Tensor, place: Hashable = "gpu 0") -> torch.Tensor:
        self.places[tensor.data_ptr()] = place
        return tensor

    def launch(self, kernel: Callable[[], object], place: Hashable = "gpu 0") -> None:
        """Queue it on this thread's current stream."""
        self._queue(place, threading.current_thread().name, "do", kernel)

    @property
    def are_used(self) -> bool:
        return bool(self.places)

    def place_of(self, tensor: torch.Tensor) -> Hashable | None:
        return self.places.get(tensor.data_ptr())

    def mark(self, place: Hashable) -> SimulatedMark:
        return self._mark(place, threading.current_thread().name)

    def copy(
        self, place: Hashable, after: Any, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> SimulatedMark:
        self._queue(place, "side", "wait", after)
        for target, source in zip(targets, sources, strict=True):
            self.queued_copies += 1
            self._queue(place, "side", "do", lambda target=target, source=source: target.copy_(source))
        return self._mark(place, "side")

    @contextmanager
    def beside(self, place: Hashable, after: Any) -> Iterator[None]:
        self._queue(place, "side", "wait", after)
        self._mark(place, "side").wait()
        yield

    def hold(self, place: Hashable, mark: Any) -> None:
        self._queue(place, threading.current_thread().name, "wait", mark)

    def lock(self, memory: mmap.mmap, place: Hashable) -> Callable[[], None]:
        if self.refusal is not None:
            raise OSError(errno.ENOMEM, self.refusal)
        self.locks.append(len(memory))

        def unlock() -> None:
            assert not memory.closed
            self.unlocks += 1

        return unlock

    def work_until(self, holds: Callable[[], bool]) -> None:
        with self._guard:
            while not holds():
                assert self._work(), "everybody waits for somebody"

    def _mark(self, place: Hashable, stream: str) -> SimulatedMark:
        mark = SimulatedMark(self)
        self._queue(place, stream, "mark", mark)
        return mark

    def _queue(self, place: Hashable, stream: str, kind: str, what: Any) -> None:
        with self._guard:
            self._queues.setdefault((place, stream), deque()).append((kind, what))
            while self._chance.random() < 0.4 and self._work():
                pass

    def _work(self) -> bool:
        ready = [queue for queue in self._queues.values() if queue and not self._must_wait(*queue[0])]
        if not ready:
            return False
        kind, what = self._chance.choice(ready).popleft()
        with torch.no_grad():
            if kind == "do":
                what()
        if kind == "mark":
            what.reached = True
        return True

    def _must_wait(self, kind: str, what: Any) -> bool:
        return kind == "wait" and not what.reached
