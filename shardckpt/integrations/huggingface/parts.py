"""What of a Trainer is no tensor: its own state, and random streams that are taken up late."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shardckpt.state import NewWorld
from shardckpt.streams import RngState

STATE_FILE = "trainer_state.json"
"""Where Trainer looks for its state, in the folder that it resumes from."""


class TrainerProgress:
    """The `TrainerState` of this rank; what was loaded is kept as text, for Trainer to read from a folder.

    In a job of another size all ranks get that of rank 0: it counts steps, and Trainer says itself what is per rank.
    """

    new_world: Literal["first"] = "first"

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self.loaded: str | None = None

    def state_dict(self) -> dict[str, Any]:
        # One text: each value in a state is an entry of the record, and the history of logs is long.
        return {"state": json.dumps(dataclasses.asdict(self._state)) if self._state is not None else ""}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.loaded = str(state_dict["state"])

    def put_into(self, folder: Path) -> None:
        """Where Trainer reads it."""
        assert self.loaded is not None
        (folder / STATE_FILE).write_text(self.loaded, encoding="utf-8")


class LateRngState:
    """As `RngState`, but the streams are taken up by `apply`: Trainer draws from them while it skips to its place."""

    new_world: NewWorld = "own"

    def __init__(self) -> None:
        self._streams = RngState()
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self._streams.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = state_dict

    def apply(self) -> None:
        """Once; nothing if none were loaded."""
        if self._loaded is not None:
            self._streams.load_state_dict(self._loaded)
            self._loaded = None


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an evaluation that can be compared: by all ranks alike."""
    return {name: value for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    try:
        return not math.isnan(float(value))
    except (TypeError, ValueError):
        return False
