"""What the caller says of differences between checkpoint and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shardckpt.state import NewWorld

_RULES = ("fail", "own", "first", "drop")


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """What to do where checkpoint and state differ. By default every difference is an error, and all are reported."""

    missing: Literal["error", "keep"] = "error"
    """A key of the state that the checkpoint lacks: keep what the state has now."""
    unexpected: Literal["error", "ignore"] = "error"
    """A key of the checkpoint, below a part that is loaded, that the state lacks."""
    shape: Literal["error", "keep"] = "error"
    """A tensor of another shape: keep what the state has now."""
    dtype: Literal["error", "keep", "cast"] = "error"
    """A tensor of another dtype: keep what the state has now, or convert to the state's dtype."""
    new_world: Mapping[str, NewWorld] = field(default_factory=dict)
    """By top-level key: what a rank gets of values that differ between ranks, in a job of another size: "fail", "own",
    "first", "drop", or a function (see `shardckpt.state`: `NewWorld`, `Merge`). A part with an attribute or method
    `new_world` says it itself."""
    in_place: bool = False
    """Read straight into the state's tensors and check the bytes as they come, rather than check all of them before
    the first is copied: up to twice as fast for files in the page cache. But if one of them is damaged, part of the
    state has changed by then, and the error says so (`state_changed`): the state must not be used before another step
    is loaded, as `resume` does. From a local or mounted file system; elsewhere bytes come by way of memory anyway."""

    def __post_init__(self) -> None:
        for key, rule in self.new_world.items():
            if not callable(rule) and rule not in _RULES:
                raise ValueError(f"new_world={{{key!r}: {rule!r}}}: one of {', '.join(_RULES)}, or a function")
        if self.in_place and "keep" in (self.missing, self.shape, self.dtype):
            raise ValueError(
                "LoadPolicy(in_place=True) cannot go with 'keep': after a damaged step there is nothing left of the "
                "state that could be kept; leave out one of them"
            )
