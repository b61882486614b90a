"""Which parts of a state are saved or restored, as one value; and what parts are usually called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

CALLED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": ("model", "module", "net", "network", "weights"),
        "optimizer": ("optimizer", "optimizers", "optim"),
        "scheduler": ("scheduler", "schedulers", "lr_scheduler", "lr_schedulers"),
        "rng": ("rng", "rng_state", "rng_states", "random", "random_states"),
        "data": ("data", "loader", "dataloader", "train_loader", "data_loader", "sampler", "dataset"),
        "scaler": ("scaler", "grad_scaler"),
        "progress": (
            "progress",
            "step",
            "step_nr",
            "global_step",
            "epoch",
            "epoch_nr",
            "trainer",
            "train_state",
            "iteration",
        ),
        "config": ("config", "args", "hparams"),
    }
)
"""Part -> the keys of a state under which it is usually found."""

_KINDS = {
    "Module": "model",
    "Optimizer": "optimizer",
    "LRScheduler": "scheduler",
    "ReduceLROnPlateau": "scheduler",
    "GradScaler": "scaler",
    "RngState": "rng",
    "TrainingProgress": "progress",
}
"""Name of a class, or of one above it -> the part that such an object is, whatever its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Which parts of a state to save or to restore: `checkpoints.save(step, Parts(optimizer=False).of(state))`.

    A top-level entry is known by what it is (a module, an optimizer, ...) or else by its key ("rng", "loader"). Entries
    that are none of these are always taken. A step of the model alone is never chosen by `resume` for a state that has
    more.
    """

    model: bool = True
    optimizer: bool = True
    scheduler: bool = True
    rng: bool = True
    data: bool = True
    scaler: bool = True
    progress: bool = True

    @classmethod
    def only(cls, *names: str) -> Parts:
        """These parts, and no others; `ValueError` for a name that is none."""
        known = [field.name for field in fields(cls)]
        if not names or set(names) - set(known):
            raise ValueError(f"Parts.only{names}: give one or more of {', '.join(known)}")
        return cls(**{name: name in names for name in known})

    def of(self, state: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The state without the other parts. What is loaded into it, or set in it, is so in the state itself."""
        return _Selected(state, self)

    def takes(self, key: str, value: object) -> bool:
        """Whether this entry of a state is among them. The same on all ranks, for states of the same keys."""
        part = part_of(key, value)
        return part is None or bool(getattr(self, part, True))


def part_of(key: str, value: object) -> str | None:
    """Which part an entry of a state is; None for none of those in `CALLED`."""
    for above in type(value).__mro__:
        if above.__name__ in _KINDS:
            return _KINDS[above.__name__]
    return next((part for part, names in CALLED.items() if key in names), None)


class _Selected(MutableMapping[str, Any]):
    """A view of a state."""

    def __init__(self, state: MutableMapping[str, Any], parts: Parts) -> None:
        self._state, self._parts = state, parts

    def __getitem__(self, key: str) -> Any:
        value = self._state[key]
        if not self._parts.takes(key, value):
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key, value in self._state.items() if self._parts.takes(key, value))

    def __len__(self) -> int:
        return sum(1 for _ in self)
