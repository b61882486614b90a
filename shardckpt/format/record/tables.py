"""What some ranks hold alike in kind, as it stands in the record: tensors, values, and how tensors lie. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shardckpt.format.index import as_dtype, as_numbers, as_shape, as_size, as_texts, runs_of
from shardckpt.format.placement import Piece

Home = Literal["model", "replicated", "rank", "frozen", "frozen_rank"]
"""In which kind of file a key lies: model.<shard>.pt, replicated.<shard>.pt, rank_<rank>.pt; or, of tensors that do not
change from step to step, frozen.<shard>.pt or frozen_rank_<rank>.pt."""

HOMES: tuple[Home, ...] = ("model", "replicated", "rank", "frozen", "frozen_rank")
VALUE_HOMES: tuple[Home, ...] = HOMES[:3]
"""Where Python values may lie."""
OF_RANK: frozenset[Home] = frozenset({"rank", "frozen_rank"})
"""Of these each rank has a file of its own."""


@dataclass(frozen=True, slots=True)
class MeshEntry:
    """A device mesh: names and sizes of its dimensions, and the global ranks in row-major order."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Hashed once: it is a key for every tensor, and may have 10,000 ranks. Numbers hash alike anywhere."""
        object.__setattr__(self, "_hash", hash((self.shape, self.ranks)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """How tensors lie: in which home and, if sharded, by which placements on which mesh; or else in pieces."""

    home: Home
    mesh: int | None = None
    placements: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    given: tuple[str, ...] = ()
    """The dimensions of the mesh that the tensors themselves know of, if not all: they were on a mesh of these."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as a whole: dtype, global shape, which layout, and which replica of a shard was written."""

    dtype: str
    shape: tuple[int, ...]
    layout: int
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """What some ranks hold alike in kind: their tensors and their Python values (key to home)."""

    ranks: tuple[int, ...]
    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Home]
    text: str = field(default="", init=False, compare=False, repr=False)
    """Its JSON, if that has been made already (see `spelled`). Of a copy with `replace` it is not known."""
    tops: frozenset[str] = field(default=frozenset(), init=False, compare=False, repr=False)
    """The top-level keys of its keys, where it keeps its JSON."""
    sound: tuple[Any, ...] = field(default=(), init=False, compare=False, repr=False)
    """Where it keeps its JSON: with which meshes and layouts nothing was found wrong with it."""


def encode_table(table: Table) -> dict[str, Any]:
    """A table as JSON, as it stands in the record and travels from a rank to rank 0."""
    entries = list(table.tensors.values())
    return {
        "ranks": runs_of(table.ranks),
        "tensors": {
            "name": list(table.tensors),
            "dtype": [e.dtype for e in entries],
            "shape": [list(e.shape) for e in entries],
            "layout": [e.layout for e in entries],
            "replica": [e.replica for e in entries],
        },
        "values": {home: [key for key, at in table.values.items() if at == home] for home in VALUE_HOMES},
    }


def spelled(table: Table) -> Table:
    """The same table, which keeps its JSON, and that it is sound: for one that stands in the records of many steps."""
    same = replace(table)
    object.__setattr__(same, "text", dumps(encode_table(table)))
    object.__setattr__(same, "tops", frozenset(tops_of(table)))
    return same


def tops_of(table: Table) -> set[str]:
    """The top-level keys: "model", "optimizer", ..."""
    return {key.split(".", 1)[0] for key in (*table.tensors, *table.values)}


def decode_table(content: Mapping[str, Any]) -> Table:
    """A table from JSON; whether its layouts are there is for the record to say."""
    columns = content["tensors"]
    rows = zip(columns["dtype"], columns["shape"], columns["layout"], columns["replica"], strict=True)
    entries = [TensorEntry(as_dtype(d), as_shape(s), as_size(at), as_size(copy)) for d, s, at, copy in rows]
    names = as_texts(columns["name"])
    values = [(key, home) for home in VALUE_HOMES for key in as_texts(content["values"][home])]
    keys = {*names, *(key for key, _ in values)}
    if len(keys) != len(names) + len(values):
        raise ValueError("a key of a table is given twice")
    return Table(as_numbers(content["ranks"]), dict(zip(names, entries, strict=True)), dict(values))


def dumps(content: Any) -> str:
    """JSON without a blank, as records have it."""
    return json.dumps(content, separators=(",", ":"))
