"""How a load deals with what differs between checkpoint and state, and what of the state it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shardckpt.engine.loading.selecting.selection import Selection
from shardckpt.state import NewWorld

_RULES = ("fail", "own", "first", "drop")


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """What to load, and what to do where checkpoint and state differ; the same on all ranks.

    By default all of the state is loaded, every difference is an error, and all are reported. Names are flat,
    "model.layers.0.weight". What is left as it is, is named in what `load` gives back, and by `plan` beforehand.

    >>> LoadPolicy(include=["model.*"], exclude=["model.head"], rename={"model.body": "model.encoder"}).missing
    'error'
    """

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
    optimizers: Literal["by_name", "by_number"] = "by_name"
    """`by_number`: state that was saved by number, as `optimizer.state_dict()` has it, is that of the parameter of
    this number of the optimizer that is in the state, as for `Optimizer.load_state_dict`: the program must make its
    groups as the one that saved did. State that was saved by name is loaded by name nevertheless."""
    in_place: bool = False
    """Read straight into the state's tensors and check the bytes as they come, rather than check all of them before
    the first is copied: up to twice as fast for files in the page cache. But if one of them is damaged, part of the
    state has changed by then, and the error says so (`state_changed`): the state must not be used before another step
    is loaded, as `resume` does. From a local or mounted file system; elsewhere bytes come by way of memory anyway."""
    include: Sequence[str] = ()
    """Load nothing but keys of the state that match one of these shell patterns, with all that lies below them:
    "model" is the whole model, "model.layers.*" its layers. All, if none is given. An optimizer, or another object
    with `load_state_dict`, is loaded as a whole or not at all: patterns that take some of it are an error."""
    exclude: Sequence[str] = ()
    """Of these leave out what matches one of these patterns. A pattern that matches nothing is an error."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Key of the state -> the checkpoint's name for it, with all that lies below: {"model.body": "model.encoder"}. Each
    * stands for the same text without dots on both sides: {"model.layers.*.mlp": "model.blocks.*.ffn"}. Of several that
    apply the longest does. It is an error if the state has no such key, or the checkpoint has nothing of such a name.
    Several may be loaded from one, {"ema": "model"}. The names of parameters in an optimizer are changed by rules of
    their own, {"optimizer.state.body": "optimizer.state.encoder"}."""

    def __post_init__(self) -> None:
        for key, rule in self.new_world.items():
            if not callable(rule) and rule not in _RULES:
                raise ValueError(f"new_world={{{key!r}: {rule!r}}}: one of {', '.join(_RULES)}, or a function")
        if self.optimizers not in ("by_name", "by_number"):
            raise ValueError(f"LoadPolicy(optimizers={self.optimizers!r}): by_name or by_number")
        if self.in_place and "keep" in (self.missing, self.shape, self.dtype):
            raise ValueError(
                "LoadPolicy(in_place=True) cannot go with 'keep': after a damaged step there is nothing left of the "
                "state that could be kept; leave out one of them"
            )
        for what in ("include", "exclude"):
            given = getattr(self, what)
            if isinstance(given, str) or not all(isinstance(pattern, str) and pattern for pattern in given):
                raise ValueError(f"LoadPolicy({what}=...) is a list of patterns, such as ['model.*']; not {given!r}")
        _ = self.selection  # whose rules must be well-formed

    @property
    def selection(self) -> Selection:
        """The same, ready to be asked."""
        return Selection(self.include, self.exclude, self.rename)
