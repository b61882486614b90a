"""The gang of one process: what a job without torchrun uses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from shardckpt.errors import GangError
from shardckpt.gang.base import Fold, Json
from shardckpt.gang.wire.messages import decode, encode


class LocalGang:
    """Rank 0 of 1. It waits for nobody, but holds its caller to the same rules as the others do:

    values must be JSON (they come back as JSON would give them), and `enter` comes first.
    """

    def __init__(self, name: str = "root") -> None:
        self._name = name
        self._entered = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    def enter(self, scope: str, *, timeout: timedelta, skipped: Sequence[str] = ()) -> None:
        self._entered = True

    def gather(self, value: Json, *, timeout: timedelta, fold: Fold | None = None) -> list[Json] | None:
        return [self._back(value)]

    def broadcast(self, value: Json, *, timeout: timedelta) -> Json:
        return self._back(value)

    def subgang(self, ranks: Sequence[int], name: str) -> LocalGang | None:
        return LocalGang(name) if 0 in ranks else None

    def line(self) -> None:
        return None

    def close(self) -> None:
        self._entered = False

    def _back(self, value: Json) -> Json:
        if not self._entered:
            raise GangError(f"gang {self._name!r} is in no scope: call enter() first, on all ranks")
        back: Json = decode(encode(value))
        return back
