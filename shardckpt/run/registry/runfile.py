"""`run.json` in the root of a run: what it is, who worked on it, and what came of it. Pure, but for the clock.

It is put once, by whoever makes the run, which is how two jobs never get one number; afterwards it is replaced, by
rank 0 of the job that works on the run. It decides nothing about checkpoints: their own records do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from shardckpt.run.registry.config import Difference
from shardckpt.run.registry.origin import Code

RUN_FILE = "run.json"
FORMAT = 1
_LONGEST = 64 << 20
"""Bytes of a run.json."""
MOST_STEPS = 10_000
"""Steps in the history; of a longer one the newest."""
MOST_SESSIONS = 1_000
"""Jobs that are listed; of more the newest."""


@dataclass(frozen=True, slots=True)
class Session:
    """One job that worked on the run."""

    started: str
    """UTC, ISO 8601."""
    host: str
    world_size: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python, torch, this package."""
    code: Code | None = None
    differences: tuple[Difference, ...] = ()
    """What its configuration has otherwise than that of the job before it."""


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A step that was committed, whether it is still there or not."""

    step: int
    saved: str
    """UTC, ISO 8601; empty while only its metrics are known."""
    nbytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What run.json says."""

    number: int
    id: str
    """80 random bits, drawn by whoever made the run."""
    name: str
    created: str
    """UTC, ISO 8601."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of the newest job; plain data without credentials."""
    sessions: tuple[Session, ...] = ()
    history: tuple[SavedStep, ...] = ()
    """By step, ascending."""

    @property
    def world_size(self) -> int:
        """Of the newest job."""
        return self.sessions[-1].world_size if self.sessions else 1

    @property
    def code(self) -> Code | None:
        """Of the newest job."""
        return self.sessions[-1].code if self.sessions else None

    def with_step(self, saved: SavedStep) -> RunInfo:
        """With this step in the history, in the place of an earlier one of its number."""
        steps = {step.step: step for step in self.history}
        known = steps.get(saved.step)
        if known is not None and not known.saved:  # only its metrics: they came before it was noted itself
            saved = replace(saved, metrics={**saved.metrics, **known.metrics})
        steps[saved.step] = saved
        return replace(self, history=tuple(steps[step] for step in sorted(steps)[-MOST_STEPS:]))

    def with_metrics(self, step: int, metrics: Mapping[str, float]) -> RunInfo:
        """With these metrics of a step, beside those that it has."""
        known = next((saved for saved in self.history if saved.step == step), SavedStep(step, "", 0))
        others = tuple(saved for saved in self.history if saved.step != step)
        return replace(self, history=others).with_step(replace(known, metrics={**known.metrics, **metrics}))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def encode_run(info: RunInfo) -> bytes:
    content: dict[str, Any] = {"format": FORMAT, **asdict(info)}
    for saved in content["history"]:  # JSON has no infinity
        saved["metrics"] = {name: v if math.isfinite(v) else str(v) for name, v in saved["metrics"].items()}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def decode_run(content: bytes) -> RunInfo:
    """`ValueError` for whatever is no whole run.json of a format that is known here. Unknown keys are passed over."""
    if len(content) > _LONGEST:
        raise ValueError(f"it has {len(content)} bytes, more than {_LONGEST}")
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"it is of format {found['format']!r:.20}, and this version reads {FORMAT}")
        return RunInfo(
            number=_number(found["number"]),
            id=_text(found["id"]),
            name=_text(found["name"]),
            created=_text(found["created"]),
            config=dict(found["config"]),
            sessions=tuple(_session(session) for session in found["sessions"]),
            history=tuple(_saved(saved) for saved in found["history"]),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it lacks something, or has it in another form: {type(error).__name__}: {error}") from error


def _session(found: Mapping[str, Any]) -> Session:
    code = found["code"]
    return Session(
        _text(found["started"]),
        _text(found["host"]),
        _number(found["world_size"]),
        {str(name): _text(text) for name, text in found["environment"].items()},
        None if code is None else Code(_text(code["commit"]), code["dirty"]),
        tuple(Difference(_text(d["key"]), d["kind"], d["was"], d["now"]) for d in found["differences"]),
    )


def _saved(found: Mapping[str, Any]) -> SavedStep:
    metrics = {str(name): float(value) for name, value in found["metrics"].items()}
    return SavedStep(_number(found["step"]), _text(found["saved"]), _number(found["nbytes"]), metrics)


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a number from 0 on, not {value!r:.40}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text, not {value!r:.40}")
    return value
