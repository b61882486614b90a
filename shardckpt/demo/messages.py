"""What the show tells the ranks (`Job`, one file) and what they tell it (`Event`, one JSON line each)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

RunName = Literal["reference", "interrupted", "resumed"]
Forget = Literal["nothing", "rng", "data"]


@dataclass(frozen=True, slots=True)
class Mesh:
    """Degrees of data and tensor parallelism; the number of ranks is their product."""

    dp: int
    tp: int

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def short(self) -> str:
        """As `--mesh` takes it."""
        return f"{self.dp}x{self.tp}"

    def __str__(self) -> str:
        return f"dp {self.dp} x tp {self.tp}"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of the model; `heads` must be divisible by the tensor-parallel degree."""

    layers: int
    dim: int
    heads: int
    context: int
    """Bytes of a window of text."""
    dropout: float = 0.1


SIZES: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig(layers=2, dim=64, heads=4, context=32),
    "small": ModelConfig(layers=4, dim=256, heads=8, context=64),
    "medium": ModelConfig(layers=8, dim=512, heads=8, context=128),
}
"""What `--size` offers: 0.1, 3.3 and 25 million parameters."""


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained: the same in all runs of a show."""

    size: str
    steps: int
    batch: int
    """Windows of a global batch."""
    seed: int
    text: str | None
    """Path of a text file; None for Shakespeare's plays."""


@dataclass(frozen=True, slots=True)
class Run:
    """One pass of training, from a fresh model or from the newest checkpoint, to the last step or to its end."""

    name: RunName
    save_every: int = 0
    """Steps between saves; 0 for a run that saves nothing."""
    resume: bool = False
    stall_at: int | None = None
    """Stop the writing (not the training) of this step when it has begun, so that it can be killed there."""
    forget: Forget = "nothing"
    """After the resume, lose this part of the state again: shows that the comparison notices."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks of one start of torchrun do."""

    training: Training
    mesh: Mesh
    runs: tuple[Run, ...]
    root: str
    """URL of the checkpoints."""
    events: str
    """Path of the file to which all ranks append what happened."""
    deadline_s: float
    """After so many seconds a rank prints where it is and exits."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Job:
        raw = json.loads(path.read_text(encoding="utf-8"))
        training, mesh = Training(**raw.pop("training")), Mesh(**raw.pop("mesh"))
        return Job(training=training, mesh=mesh, runs=tuple(Run(**run) for run in raw.pop("runs")), **raw)


@dataclass(frozen=True, slots=True)
class Started:
    """From every rank, first of all."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Built:
    """From rank 0 when the model of a run is there: what is trained, on what."""

    run: RunName
    parameters: int
    text_nbytes: int
    device: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """From rank 0 after each step: the mean loss of the global batch before the update."""

    run: RunName
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Saved:
    """From every rank when a save of its has been committed: what it cost there, and the bytes of all ranks."""

    run: RunName
    step: int
    nbytes: int
    stall_s: float
    stage_s: float
    write_s: float
    commit_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Writing:
    """From the rank that stalls: the writing of the step has begun and is held there."""

    step: int
    key: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """From rank 0: which step was resumed, of which, and how long it took."""

    step: int
    committed: list[int]
    skipped: list[tuple[int, str]]
    """Newer steps that were passed over, and why."""
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """From rank 0 at the end of a run: the committed steps then."""

    run: RunName
    committed: list[int]


@dataclass(frozen=True, slots=True)
class Failed:
    """From every rank that ends with an error of a usual kind: what a person needs to know of it."""

    rank: int
    message: str


Event: TypeAlias = "Started | Built | Stepped | Saved | Writing | Resumed | Finished | Failed"
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Started, Built, Stepped, Saved, Writing, Resumed, Finished, Failed)
}


class Reporter:
    """Appends events to a file that all ranks share; a line is one write, so that lines never mix. For `with`."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def tell(self, event: Event) -> None:
        line = json.dumps({"kind": type(event).__name__, **asdict(event)}) + "\n"
        os.write(self._descriptor, line.encode())

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


class Listener:
    """Reads the events of a file as they come."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._position = 0

    def new_events(self) -> Iterator[Event]:
        """What has been written since the last call; a line that is not complete yet is left for the next."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            fresh = file.read()
        complete = fresh[: fresh.rfind(b"\n") + 1]
        self._position += len(complete)
        for line in complete.splitlines():
            fields = json.loads(line)
            yield _KINDS[fields.pop("kind")](**fields)
