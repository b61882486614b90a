"""What of a state does not fit: told as a problem, or noted as left, as the policy says. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.fitting.claims import nearest
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.sources import Sources

OF_OTHERS = "of other ranks in the checkpoint"
DROPPED = "dropped for another number of ranks, as new_world says"


@dataclass(frozen=True, slots=True)
class Differences:
    """Of one load on one rank; all goes into the `fit`."""

    sources: Sources
    policy: LoadPolicy
    fit: Fit

    def problem(self, text: str) -> None:
        self.fit.problems.append(text)

    def left(self, name: str, why: str) -> None:
        self.fit.left[name] = why

    def shape(self, name: str, saved: tuple[int, ...], own: tuple[int, ...]) -> None:
        self._other("shape", name, list(saved), list(own), keep=self.policy.shape == "keep")

    def dtype(self, name: str, saved: str, own: str) -> None:
        self._other("dtype", name, saved, own, keep=self.policy.dtype == "keep")

    def missing(self, name: str, instead: str = "") -> None:
        """The checkpoint has no such key, or has something else `instead`."""
        selection = self.fit.selection
        if instead:
            self.problem(f"kind: {selection.called(name)} {instead} in the checkpoint, but not in the state")
        elif self.policy.missing == "keep":
            self.left(name, "not in the checkpoint")
        else:
            saved = selection.saved_name(name)
            near = nearest(saved, map(selection.saved_name, self.sources.names()))
            other = "" if saved == name else f" (as {saved})"
            self.problem(f"missing: {name} is in the state but not in the checkpoint{other}{near}")

    def _other(self, kind: str, name: str, saved: object, own: object, *, keep: bool) -> None:
        if keep:
            self.left(name, f"of another {kind} in the checkpoint")
        else:
            self.problem(f"{kind}: {self.fit.selection.called(name)} is {saved} in the checkpoint, {own} in the state")
