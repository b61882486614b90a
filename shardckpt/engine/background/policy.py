"""How a manager saves: how the state is copied, and what becomes of a save that comes while others are under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

StagingMode: TypeAlias = Literal["overlap", "blocking", "none"]
"""`overlap`: parameters and optimizer state are copied while training goes on, the rest before `save` returns.
`blocking`: all is copied before `save` returns. `none`: no copy; the state is written, through memory of a fixed size,
before `save` returns. The bytes on disk are the same."""

WhenBusy: TypeAlias = Literal["wait", "skip", "replace"]
"""`wait`: until there is room. `skip`: the new save is not made. `replace`: those not yet committed are given up for
it."""


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """How a manager saves; the same on all ranks.

    >>> SavePolicy(staging="blocking", when_busy="skip").in_flight
    1
    """

    staging: StagingMode = "overlap"
    verify_copies: bool = False
    """Sum the state up when `save` is called and again when it is written: a save in between which something changed
    what had not been copied yet (an update of parameters without `guard()`) fails, and names the tensors. It costs a
    pass over the state at each `save`, on the training's thread. With staging "none" this is always done."""
    when_busy: WhenBusy = "wait"
    in_flight: int = 1
    """How many saves may be under way. Each takes host memory for its copy of the state; with `replace`, one more
    while those given up come to their end. They are written one after the other."""

    def __post_init__(self) -> None:
        if self.staging not in get_args(StagingMode):
            raise ValueError(f"staging is one of {', '.join(get_args(StagingMode))}, not {self.staging!r}")
        if self.when_busy not in get_args(WhenBusy):
            raise ValueError(f"when_busy is one of {', '.join(get_args(WhenBusy))}, not {self.when_busy!r}")
        if self.in_flight < 1:
            raise ValueError(f"at least one save must be in flight, not {self.in_flight}")
