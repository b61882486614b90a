"""The component of torchtitan 0.3 and later: made by its config, in the trainer's place for a checkpointer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from shardckpt.errors import InvalidOperationError
from shardckpt.integrations.frameworks import need
from shardckpt.integrations.titan.config import AsyncMode
from shardckpt.integrations.titan.duties import Checkpointer

_WHERE = "torchtitan.components.checkpointer"


@cache
def component() -> Any:
    """The class: a `BaseCheckpointManager` and a `Checkpointer`. Its `Config` has the fields of torchtitan's own, and
    their checks, for the trainer's `checkpoint`."""
    need("torchtitan", extra="torchtitan")
    if find_spec(_WHERE) is None:
        raise InvalidOperationError(
            f"torchtitan {version('torchtitan')} has no {_WHERE}, which came with 0.3: put Checkpointer where its "
            "trainer has its CheckpointManager"
        )
    base = need(_WHERE, extra="torchtitan").BaseCheckpointManager

    @dataclass(kw_only=True, slots=True)
    class Config(base.Config):  # type: ignore[misc, name-defined]
        async_mode: AsyncMode = "async"

    def make(self: Any, config: Any, **components: Any) -> None:
        Checkpointer.__init__(self, config=config, **components)
        self.save_future = None

    hooks = {name: lambda self, *_: None for name in base.__abstractmethods__ if not hasattr(Checkpointer, name)}
    own = {"Config": Config, "__init__": make, "__module__": __name__}
    return type("ShardedCheckpointManager", (Checkpointer, base), {**hooks, **own})
