"""What a Lightning trainer is made of, as a state: live objects where they are large, Lightning's values elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shardckpt.state import NewWorld
from shardckpt.streams import RngState

MODEL, OPTIMIZER, TRAINER, DATA, RNG = "model", "optimizer", "trainer", "data", "rng"


class Held:
    """Values that one hands over to be saved, and finds here when they have been loaded. All ranks hold them alike, or
    else each its own: `new_world` says what becomes of them then in a job of another size."""

    def __init__(self, values: Mapping[str, Any], *, new_world: NewWorld) -> None:
        self.values = dict(values)
        self.new_world = new_world
        self.is_loaded = False

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.values, self.is_loaded = dict(state_dict), True


class Streams(RngState):
    """Random streams that are set once more where training goes on: Lightning draws from them in between."""

    def __init__(self) -> None:
        self._loaded: Mapping[str, Any] | None = None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = state_dict
        self.set_again()

    def set_again(self) -> None:
        if self._loaded is not None:
            super().load_state_dict(self._loaded)


def state_to_save(trainer: Any, *, weights_only: bool) -> dict[str, Any]:
    """On the training's thread of every rank. Tensors are those of the training, not copies."""
    module = trainer.lightning_module
    checkpoint, own = _dump(trainer, weights_only=weights_only)
    given = checkpoint.pop("state_dict")
    same = given.keys() == own.keys() and all(given[name] is own[name] for name in own)
    state: dict[str, Any] = {MODEL: module if same else given}  # a hook of the user's wants other tensors saved
    if weights_only:
        return state
    checkpoint.pop("optimizer_states", None)
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", [])
    return {
        **state,
        **optimizers_of(trainer),
        TRAINER: Held(checkpoint, new_world="first"),
        DATA: Held({"loaders": loaders}, new_world="drop"),
        RNG: RngState(),
    }


def optimizers_of(trainer: Any) -> dict[str, Any]:
    """As an entry of a state; none if there is no optimizer."""
    found = trainer.strategy.optimizers
    if not found:
        return {}
    return {OPTIMIZER: found[0] if len(found) == 1 else {str(i): optimizer for i, optimizer in enumerate(found)}}


def _dump(trainer: Any, *, weights_only: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lightning's own checkpoint, hooks and all, but without what takes a strategy long to gather: of the model what
    the module itself has, which is also given, and nothing of the optimizers."""
    own = trainer.lightning_module.state_dict()
    answers = {"lightning_module_state_dict": lambda: dict(own), "optimizer_state": lambda optimizer: {}}
    with answering(trainer.strategy, answers):
        return trainer._checkpoint_connector.dump_checkpoint(weights_only), own


@contextmanager
def answering(strategy: Any, answers: Mapping[str, Any]) -> Iterator[None]:
    """These methods of that strategy are others for a while."""
    before = {name: vars(strategy)[name] for name in answers if name in vars(strategy)}
    vars(strategy).update(answers)
    try:
        yield
    finally:
        for name in answers:
            vars(strategy).pop(name, None)
        vars(strategy).update(before)
