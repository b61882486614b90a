"""What must be true of a training however it is disturbed: of what its ranks say, and of what lies in its root."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import shardckpt as sc
from tests.kills.elastic import Line, make_model, total
from tests.kills.enduring import undisturbed


class Truth:
    """The numbers of the undisturbed training, as far as they were asked for. Any thread may ask."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by whoever uses the random stream of this process."""
        self._steps = undisturbed()
        self._known: list[tuple[float, float]] = []
        self._stream: torch.Tensor | None = None

    def loss(self, step: int) -> float:
        return self._of(step)[0]

    def total(self, step: int) -> float:
        """Of the squares of the parameters after that step."""
        return self._of(step)[1]

    def _of(self, step: int) -> tuple[float, float]:
        with self.lock:
            if self._stream is not None:
                torch.set_rng_state(self._stream)
            while len(self._known) < step:
                self._known.append(next(self._steps)[1:])
            self._stream = torch.get_rng_state()
            return self._known[step - 1]


class Notes:
    """The file into which the ranks write, from where it was last read."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""
        path.touch()

    def new(self) -> list[Line]:
        with self._path.open("rb") as file:
            file.seek(self._at)
            pieces = file.read()
        self._at += len(pieces)
        *whole, self._rest = (self._rest + pieces).split(b"\n")
        lines = [Line.parse(text.decode()) for text in whole]
        assert None not in lines, whole
        return [line for line in lines if line is not None]


@dataclass
class Judge:
    """Hears every line at once, and writes down what is wrong."""

    truth: Truth
    promised: int = 0
    """The newest step that any rank was told to be committed."""
    wrong: list[str] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    furthest: int = 0
    """The highest step with a loss."""
    last: dict[int, Line] = field(default_factory=dict)
    """By process, what it has said last."""
    ended: dict[int, Line] = field(default_factory=dict)
    """By rank."""
    gap_s: float = 0.0
    """The longest time without a step that was new."""
    _promised_before: dict[int, int] = field(default_factory=dict)
    """By process, when it began to look. (torchrun may have two lives at once, each of a node that takes the other for
    dead: what the other was promised since is no fault.)"""
    _advanced_at: float = field(default_factory=time.monotonic)

    def hear(self, line: Line) -> None:
        self.words[line.word] += 1
        self.last[line.pid] = line
        if line.word == "told":
            self.promised = max(self.promised, line.step)
        elif line.word == "load":
            self._promised_before[line.pid] = self.promised
        elif line.word == "resumed" and line.step < self._promised_before[line.pid]:
            promised = self._promised_before[line.pid]
            self.wrong.append(f"step {promised} was promised, and rank {line.rank} goes on from {line.step}")
        elif line.word == "loss":
            self._compare("loss", line, self.truth.loss(line.step))
            if line.step > self.furthest:
                self.gap_s = max(self.gap_s, line.at_s - self._advanced_at)
                self.furthest, self._advanced_at = line.step, line.at_s
        elif line.word == "ended":
            self._compare("sum", line, self.truth.total(line.step))
            self.ended[line.rank] = line

    def _compare(self, what: str, line: Line, expected: float) -> None:
        found = float.fromhex(line.value)
        if found != expected:
            self.wrong.append(f"{what} of step {line.step} on rank {line.rank}: {found!r}, undisturbed {expected!r}")


class Watcher:
    """Looks at the root again and again, as another process would, from a thread of its own.

    Whatever is offered must be whole and hold the numbers of its step, and what was promised before the look must be
    there, or a newer one. An error of a storage that is down says nothing.
    """

    def __init__(self, root: str, options: Mapping[str, object], judge: Judge, *, every_s: float) -> None:
        self._root, self._options, self._judge, self._every_s = root, options, judge, every_s
        self.looks = self.loads = self.unanswered = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher")

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                self.look()
            except sc.CheckpointError:
                self.unanswered += 1
            except Exception as error:
                self._judge.wrong.append(f"a look at the catalog: {type(error).__name__}: {error}")

    def look(self) -> int:
        """The newest step, loaded and compared."""
        promised = self._judge.promised
        with sc.CheckpointManager(self._root, sc.Gangs.local(), storage_options=self._options or None) as checkpoints:
            steps = checkpoints.steps()
            self.looks += 1
            if max(steps, default=0) < promised:
                self._judge.wrong.append(f"step {promised} was promised, and these are there: {steps}")
            for step in reversed(steps):
                if self._is_right(checkpoints, step):
                    return step
        return 0

    def _is_right(self, checkpoints: sc.CheckpointManager, step: int) -> bool:
        """False if it has gone since it was listed."""
        with self._judge.truth.lock:
            model, optimizer = make_model(1)
        try:
            checkpoints.load(step, {"model": model, "optimizer": optimizer})
        except (sc.CheckpointNotFoundError, sc.CheckpointDamagedError) as error:
            if step not in checkpoints.steps():
                return False
            self._judge.wrong.append(f"step {step} is offered, and: {error}")
            raise
        self.loads += 1
        if total(model) != self._judge.truth.total(step):
            self._judge.wrong.append(f"step {step} holds other numbers than that step of the undisturbed training")
        return True
