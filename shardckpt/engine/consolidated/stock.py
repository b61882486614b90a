"""What the ranks hold of the model, before anything of it is written: told to rank 0, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import nn

from shardckpt.engine.consolidated.assembling.whole import Kind
from shardckpt.engine.consolidated.holding import FlatPiece, Holding, holding_of
from shardckpt.engine.consolidated.inventory import Inventory
from shardckpt.errors import CheckpointSaveError
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather


@dataclass(frozen=True, slots=True)
class Told:
    """What rank 0 heard of one rank's holding."""

    inventory: str
    flat: Sequence[FlatPiece]
    alike: dict[str, str]
    values: dict[str, str]

    @classmethod
    def decode(cls, content: Any) -> Told:
        flat = [FlatPiece.decode(piece) for piece in content["flat"]]
        return cls(content["inventory"], flat, content["alike"], content["values"])


class Stock:
    """All methods on all ranks, unless they say otherwise."""

    holding: Holding
    """Of this rank."""
    kinds: Sequence[Kind]
    """On rank 0."""

    def __init__(self, gang: Gang, *, step: int, timeout: timedelta) -> None:
        self._gang = gang
        self._step = step
        self._terms: dict[str, Any] = {"timeout": timeout, "step": step}
        self.told: list[Told] = []
        """On rank 0, by rank."""

    def take(self, model: nn.Module, model_key: str) -> None:
        """`GangError` if a rank cannot say what it holds; `CheckpointSaveError` on all ranks if two hold different
        values of what they are taken to hold alike."""
        self.holding = self._take_stock(model, model_key)
        self.kinds = self._kinds(self.holding)
        self._compare(self.holding)

    def _take_stock(self, model: nn.Module, model_key: str) -> Holding:
        """What this rank holds; rank 0 hears of what all do."""
        holdings: list[Holding] = []

        def look() -> Any:
            holdings.append(holding_of(model, model_key))
            return holdings[0].announcement()

        told = together_gather(self._gang, look, phase="look at the model", **self._terms)
        self.told = [Told.decode(each) for each in told or ()]
        return holdings[0]

    def _kinds(self, holding: Holding) -> list[Kind]:
        """On rank 0 the inventories that there are, each with the ranks that have it; each is sent by one rank."""
        ranks_of: dict[str, list[int]] = {}
        for rank, told in enumerate(self.told):
            ranks_of.setdefault(told.inventory, []).append(rank)
        unknown = [ranks[0] for ranks in ranks_of.values() if ranks[0] != 0]
        asked = announce(self._gang, lambda: unknown, phase="plan the file", **self._terms)
        if not asked:
            return [Kind(holding.inventory, tuple(ranks)) for ranks in ranks_of.values()]

        def own() -> Any:
            return holding.inventory.encode() if self._gang.rank in asked else None

        sent: Any = together_gather(self._gang, own, phase="plan the file", **self._terms)
        return [
            Kind(Inventory.decode(sent[ranks[0]]) if ranks[0] else holding.inventory, tuple(ranks))
            for ranks in ranks_of.values()
        ]

    def _compare(self, holding: Holding) -> None:
        """`CheckpointSaveError` on all ranks if two hold different values of what they are taken to hold alike."""
        doubtful = announce(self._gang, self._doubtful, phase="compare", **self._terms)
        if not doubtful:
            return

        def held() -> Any:
            return [
                [group, dict(held)]
                for group, held in holding.alike.items()
                if [holding.inventory.digest, group] in doubtful
            ]

        gathered: Any = together_gather(self._gang, held, phase="compare", **self._terms)
        message = announce(self._gang, lambda: self._explain(gathered), phase="compare", **self._terms)
        raise CheckpointSaveError(f"step {self._step}: {message}", step=self._step)

    def _doubtful(self) -> list[list[str]]:
        """On rank 0: the groups whose ranks do not all have one digest."""
        seen: dict[tuple[str, str], set[str]] = {}
        for told in self.told:
            for group, digest in told.alike.items():
                seen.setdefault((told.inventory, group), set()).add(digest)
        return [list(group) for group, digests in seen.items() if len(digests) > 1]

    def _explain(self, gathered: Sequence[Any]) -> str:
        """On rank 0: which tensors differ between which ranks, and what to do."""
        seen: dict[tuple[str, str, str], dict[str, int]] = {}
        for rank, groups in enumerate(gathered):
            for group, held in groups:
                for name, digest in held.items():
                    seen.setdefault((name, group, self.told[rank].inventory), {}).setdefault(digest, rank)
        pairs = {key[0]: sorted(ranks.values())[:2] for key, ranks in sorted(seen.items()) if len(ranks) > 1}
        lines = [f"{name} (for example ranks {ranks[0]} and {ranks[1]})" for name, ranks in sorted(pairs.items())]
        more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
        return (
            "ranks hold different values of tensors of which the consolidated model has but one: "
            f"{'; '.join(lines[:10])}{more}. Bring the ranks into step, or, if each has a part of it, make it a "
            "DTensor that says so"
        )
