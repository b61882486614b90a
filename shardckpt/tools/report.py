"""What a look at checkpoints found, as data: for programs, for `--json`, and for what people read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shardckpt.run.choosing.parts import CALLED

REBUILT = "rebuilt"
"""Key in the metadata of a record that `repair` has made: from what, when, and what is lost."""
ADDED = "added"
"""Key in the metadata of a record that `convert` has made: which parts it was given that were not there, from where."""
PARTS = ("model", "optimizer", "scheduler", "rng", "data", "progress", "config")
"""What a training job needs to go on; a report says of each whether it is there."""

Verdict = Literal["COMPLETE", "PARTIAL", "DAMAGED"]
"""DAMAGED: bytes are missing or wrong. PARTIAL: what is there is sound, but it is not committed, or the model, the
optimizer or the random states are not in it. COMPLETE: sound, and a job can go on from it."""

Standing = Literal["committed", "uncommitted", "replaced", "set aside", "foreign"]
"""committed: in force. uncommitted: a folder without a record in force, never offered. replaced: an older save of a
step that is in force elsewhere. set aside: by a repair. foreign: files of others, which no record speaks of."""

_NEEDED = ("model", "optimizer", "rng")

_FOREIGN_FILES = {
    "model": ("model", "pytorch_model", "adapter_model", "consolidated", "weights", "diffusion_pytorch_model"),
    "optimizer": ("optimizer", "optim"),
    "scheduler": ("scheduler", "lr_scheduler"),
    "rng": ("rng_state", "random_states", "rng"),
    "data": ("dataloader", "sampler"),
    "progress": ("trainer_state", "training_state", "train_state", "progress"),
    "config": ("config", "adapter_config", "training_args", "params"),
}
"""Part -> how the names of the files begin that hold it in checkpoints of others."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One file that is not as it should be."""

    file: str
    """Relative to the folder of the checkpoint."""
    what: str
    tensors: tuple[str, ...] = ()
    """The tensors in whose bytes the damage lies, if the file's index could tell."""

    def __str__(self) -> str:
        if not self.tensors:
            return f"{self.file}: {self.what}"
        more = f" and {len(self.tensors) - 5} more" if len(self.tensors) > 5 else ""
        return f"{self.file}: {self.what}: {', '.join(self.tensors[:5])}{more}"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What was found of one checkpoint."""

    step: int | None
    """None of a foreign one whose name does not tell."""
    folder: str
    """Relative to `RunReport.url`; empty if it is that place itself."""
    standing: Standing
    verdict: Verdict
    parts: Mapping[str, bool]
    """Each of `PARTS`: whether it is there."""
    others: tuple[str, ...] = ()
    """Top-level keys that are none of these."""
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    """What is no damage, and worth knowing: what could not be checked, files that nobody names."""
    files: int = 0
    nbytes: int = 0
    """Of the files that were looked at."""
    checked_nbytes: int = 0
    """Of those, the bytes that were read and compared with a digest."""
    world_size: int | None = None
    attempt: str | None = None
    created: str | None = None
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What was found below a place."""

    url: str
    """Without credentials."""
    quick: bool
    steps: tuple[StepReport, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing that is offered, or of others, is damaged. What never was committed does not count."""
        return not any(s.verdict == "DAMAGED" for s in self.steps if s.standing in ("committed", "foreign"))


def parts_of(keys: tuple[str, ...], *, config: bool) -> tuple[dict[str, bool], tuple[str, ...]]:
    """Which of `PARTS` these top-level keys of a state are, and the keys that are none of them."""
    known = {name: part for part in PARTS for name in CALLED[part]}
    found = {known[key] for key in keys if key in known} | ({"config"} if config else set())
    return {part: part in found for part in PARTS}, tuple(key for key in keys if key not in known)


def parts_of_files(names: tuple[str, ...]) -> dict[str, bool]:
    """The same for the files of a foreign checkpoint, by their names."""
    stems = [name.rpartition("/")[2].lower() for name in names]
    return {part: any(stem.startswith(begin) for stem in stems for begin in _FOREIGN_FILES[part]) for part in PARTS}


def judge(parts: Mapping[str, bool], problems: tuple[Problem, ...], *, whole: bool) -> Verdict:
    """`whole`: whether it is a checkpoint at all, and more than a model."""
    if problems:
        return "DAMAGED"
    return "COMPLETE" if whole and all(parts[part] for part in _NEEDED) else "PARTIAL"
