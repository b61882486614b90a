"""The processes that act together. Importing this imports no torch; `ProcessGroupGang` does when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardckpt.gang.base import Gang, GatherError, Json
from shardckpt.gang.gangs import Gangs
from shardckpt.gang.local import LocalGang
from shardckpt.gang.store import StoreGang
from shardckpt.gang.together import together, together_gather

if TYPE_CHECKING:
    from shardckpt.gang.process_group import ProcessGroupGang

__all__ = [
    "Gang",
    "Gangs",
    "GatherError",
    "Json",
    "LocalGang",
    "ProcessGroupGang",
    "StoreGang",
    "together",
    "together_gather",
]


def __getattr__(name: str) -> object:
    if name == "ProcessGroupGang":
        from shardckpt.gang.process_group import ProcessGroupGang

        return ProcessGroupGang
    raise AttributeError(f"module 'shardckpt.gang' has no attribute {name!r}")
