"""Where the bytes of a tensor, or a value, lie in a committed step: from its record, before any file is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.finding.shards import Shards
from shardckpt.format.manifest import HOMES, OF_RANK, Home, LayoutEntry, Manifest, Table, TensorEntry
from shardckpt.format.placement import Box, Piece
from shardckpt.format.record.columns import FilesByName
from shardckpt.format.record.homes import home_file
from shardckpt.state import NewWorld

Chunk = tuple[str, Box]
"""A file, and a box of the tensor that it holds."""

Whose = NewWorld | int
"""A rule, or the very rank (of those that saved)."""

_MOST_CHUNKS = 1 << 19
"""Of one tensor: far more than any job has ranks. A few bytes of a record can claim any number."""


class BelongsToRankError(ValueError):
    """A value that differs between the ranks that saved it, asked for by a job of another shape."""


class _Found(NamedTuple):
    entry: TensorEntry
    layout: LayoutEntry
    table: Table


class Sources:
    """The record as one loading rank sees it."""

    def __init__(self, manifest: Manifest, at: Coordinates) -> None:
        self._manifest = manifest
        self.at = at
        self._differ = frozenset(manifest.differ)
        inside = f"{manifest.attempt}/"  # on object stores files lie below their attempt
        self._files = FilesByName(manifest.files)
        self._folder = inside if self._files.begins_with(inside) else ""
        self._same_ranks, self._shard_count = at.world_size == manifest.world_size, manifest.shards
        self._same_shards = at.shards == self._shard_count
        own = [table for table in manifest.tables if self._same_ranks and at.rank in table.ranks]
        self._tables = own + [table for table in manifest.tables if table not in own]
        self._shards = Shards(manifest, at.shard)
        self._chunks: dict[tuple[int, tuple[int, ...], int, bool, Sequence[Box] | None], list[Chunk]] = {}
        self._nearest: dict[int, int] = {}
        self._trees: dict[int, list[str]] = {}
        self._under: dict[str, list[str]] = {}

    def tensor(self, name: str, rule: Whose = "first") -> TensorEntry | None:
        """The tensor's entry, or None if the step has no such tensor. The rule matters if ranks held different ones."""
        found = self._find(name, rule)
        return found.entry if found else None

    def value_home(self, key: str) -> Home | None:
        """In which kind of file the value lies, or None if the step has no such value."""
        return next((table.values[key] for table in self._tables if key in table.values), None)

    def names(self) -> Iterator[str]:
        """All keys of the step: tensors and values."""
        seen: set[str] = set()
        for table in self._tables:
            for name in (*table.tensors, *table.values):
                if name not in seen:
                    seen.add(name)
                    yield name

    def under(self, prefix: str) -> list[str]:
        """The keys below a part: the part itself, or what begins with its name and a dot."""
        if not self._under:  # 20,000 tensors may be as many parts: no search through all names for each of them
            for name in self.names():
                for end in (*(at for at, letter in enumerate(name) if letter == "."), len(name)):
                    self._under.setdefault(name[:end], []).append(name)
        return list(self._under.get(prefix, ()))

    def held_by(self, rank: int) -> frozenset[str]:
        """The keys that this rank of those that saved had in its state."""
        tables = [table for table in self._tables if rank in table.ranks]
        return frozenset(key for table in tables for key in (*table.tensors, *table.values))

    def files(self) -> frozenset[str]:
        """The files that may hold anything of the keys that are here."""
        found: set[tuple[int, Home]] = set()
        layouts = self._manifest.layouts
        for table in self._tables:
            numbers = {entry.layout for entry in table.tensors.values()}
            homes = {layouts[number].home for number in numbers} | set(table.values.values())
            found |= {(rank, home) for rank in table.ranks for home in homes}
            found |= {(piece.rank, layouts[number].home) for number in numbers for piece in layouts[number].pieces}
        return frozenset(self.files_of(rank, home) for rank, home in found)

    def chunks(
        self, name: str, rule: Whose, *, whole: bool = True, parts: tuple[Box, ...] | None = None
    ) -> list[Chunk]:
        """Files and boxes that together make up the tensor, each box once; or these parts of it, and perhaps more.

        Of copies in several files a rank that reads the tensor `whole` gets the near one. Ranks that read parts of it
        all get the same one: from parts of different copies no checksum of a record could be put together.
        """
        found = self._find(name, rule)
        if found is None:
            raise KeyError(name)
        if found.layout.mesh is None and not found.layout.pieces:
            shape = found.entry.shape
            zeros = (0,) * len(shape)
            return [(self._plain_file(name, found, rule, whole=whole), Box(zeros, shape, zeros))]
        key = (found.entry.layout, found.entry.shape, found.entry.replica, whole, parts)
        if key not in self._chunks:
            self._chunks[key] = (
                self._in_pieces(found.layout, parts)
                if found.layout.pieces
                else self._sharded(found, parts, whole=whole)
            )
        return self._chunks[key]

    def part_rank(self, keys: Sequence[str], rule: NewWorld, *, alike: bool = False) -> int | None:
        """The rank (of those that saved) whose values a whole part takes; None: keep what is there now.

        Keys belong to their ranks if they differ between ranks, or, in a part that is taken as one (`alike`), if not
        all ranks that have some of the part have them.
        """
        having = self._having(keys) if alike else ()
        for key in keys:
            _, home = self._locate(key)
            differs = key in self._differ or (alike and home in OF_RANK and self._having([key]) != having)
            if differs and not self._same_position(home):
                return self._by_rule(keys, rule, key)
        return self._near(self._locate(keys[0])[0])

    def optimizer_ranks(
        self, keys: Sequence[str], rule: NewWorld, *, is_all: Callable[[frozenset[str]], bool]
    ) -> tuple[int, ...]:
        """The ranks (of those that saved) that together know all groups of an optimizer; none: keep what is there now.

        Pipeline stages have groups of their own parameters; these go by name, so that they may be put together.
        `is_all`: whether a rank that held these keys knew all parameters; its own are then enough on the same ranks.
        """
        lists = {key for key in keys if key.endswith(".params")}
        rank = self.part_rank([key for key in keys if key not in lists] or keys, rule)
        if rank is None:
            return ()
        is_own = self._differ.isdisjoint(lists) or (self._same_position("rank") and is_all(self.held_by(rank)))
        if rule != "fail" or is_own:
            return (rank,)
        others = [self._near(self._tables[number]) for number in self._having(keys)]
        return tuple(dict.fromkeys((rank, *others)))

    def siblings(self) -> tuple[int, ...]:
        """The data-parallel ranks (of those that saved) of this rank's model shard; of the first, if shards are others.

        In their order: what a rank held as one of several that train on different data.
        """
        shard = self.at.shard if self._same_shards else 0
        return tuple(rank for rank, its in enumerate(self._manifest.shard_of) if its == shard)

    @property
    def place(self) -> tuple[int, int]:
        """This rank's number among its data-parallel ranks, and how many they are."""
        return self.at.dp_ranks.index(self.at.rank), self.at.dp_size

    def is_sharded(self, name: str) -> bool:
        """Whether the tensor was saved in shards, or in pieces."""
        found = self._find(name, "first")
        return found is not None and (found.layout.mesh is not None or bool(found.layout.pieces))

    def is_same_job(self) -> bool:
        """Whether this job has the ranks and model shards of the one that saved."""
        return self._same_position("rank")

    def trees_of(self, rank: int) -> list[str]:
        """The files whose trees together hold what that rank held, its own first."""
        if rank not in self._trees:
            names = [*(self.files_of(rank, home) for home in HOMES), *self._elsewhere(rank)]
            self._trees[rank] = [name for name in dict.fromkeys(names) if self._has_tree(name)]
        return self._trees[rank]

    def _has_tree(self, name: str) -> bool:
        file = self._files.get(name)
        return file is not None and file.tree is not None and file.kind in HOMES

    def files_of(self, rank: int, home: Home) -> str:
        """The file of that kind that belongs to a rank of those that saved."""
        return self._folder + home_file(home, rank, self._manifest.shard_of[rank], self._shard_count)

    def _elsewhere(self, rank: int) -> Iterator[str]:
        """For each tensor that this rank held, and of which only others wrote pieces, a file that has one."""
        writers = {
            number: {piece.rank: None for piece in layout.pieces}
            for number, layout in enumerate(self._manifest.layouts)
            if layout.pieces
        }
        held = next((table for table in self._manifest.tables if rank in table.ranks), None)
        for number in {entry.layout for entry in held.tensors.values()} if held else ():
            if number in writers and rank not in writers[number]:
                yield self.files_of(next(iter(writers[number])), "rank")

    def _locate(self, key: str) -> tuple[Table, Home]:
        for table in self._tables:
            if key in table.values:
                return table, table.values[key]
            if key in table.tensors:
                return table, self._manifest.layouts[table.tensors[key].layout].home
        raise KeyError(key)

    def _find(self, name: str, rule: Whose) -> _Found | None:
        every = self._tables
        tables = every if len(every) == 1 else [table for table in every if name in table.tensors]
        if name in self._differ and len(tables) > 1 and rule != "fail":  # of other dtypes or shapes
            home = self._manifest.layouts[tables[0].tensors[name].layout].home
            rank = None if self._same_position(home) else self._by_rule([name], rule, name)
            tables.sort(key=lambda table: rank not in table.ranks)
        table = next(iter(tables), None)
        entry = None if table is None else table.tensors.get(name)
        return _Found(entry, self._manifest.layouts[entry.layout], table) if table and entry else None

    def _having(self, keys: Iterable[str]) -> tuple[int, ...]:
        """The numbers of the tables that have any of these keys."""
        named = enumerate(self._tables)
        return tuple(i for i, table in named if any(key in table.tensors or key in table.values for key in keys))

    def _holders(self, keys: Iterable[str]) -> frozenset[int]:
        """The ranks that had any of these keys in their state."""
        return frozenset(rank for number in self._having(keys) for rank in self._tables[number].ranks)

    def _near(self, table: Table) -> int:
        """This rank's counterpart among those that saved: the same number, else one of the same shard, else any."""
        if id(table) not in self._nearest:  # asked for every key, and there may be 10,000 ranks to look at
            self._nearest[id(table)] = self._nearest_in(table.ranks)
        return self._nearest[id(table)]

    def _nearest_in(self, ranks: Sequence[int]) -> int:
        if self.at.rank in ranks and (self._same_ranks or not self._same_shards):
            return self.at.rank
        if self._same_shards:
            same = [rank for rank in ranks if self._manifest.shard_of[rank] == self.at.shard]
            if same:
                return same[self.at.rank % len(same)]
        return ranks[self.at.rank % len(ranks)]

    def _same_position(self, home: Home) -> bool:
        return self._same_ranks and self._same_shards if home in OF_RANK else self._same_shards

    def _by_rule(self, keys: Sequence[str], rule: Whose, example: str) -> int | None:
        """The rank that has these keys, of which `example` is not alike on all that saved."""
        manifest = self._manifest
        if rule == "fail":
            count = len(self._holders([example]))
            how = "with a different value by each" if count == manifest.world_size else f"by only {count}"
            raise BelongsToRankError(
                f"{example} was saved {how} of {manifest.world_size} ranks ({manifest.shards} model "
                f"shards), and this job has {self.at.world_size} ({self.at.shards}); say what a rank gets: "
                f"new_world={{{example.split('.', 1)[0]!r}: 'own', 'first', 'drop' or a function}}"
            )
        holders = self._holders(keys)
        if rule == "first":
            return min(holders)
        rank = rule if isinstance(rule, int) else self.at.rank
        return rank if rank in holders else None

    def _plain_file(self, name: str, found: _Found, rule: Whose, *, whole: bool) -> str:
        home = found.layout.home
        if name in self._differ and not self._same_position(home):
            rank = self._by_rule([name], rule, name)
            assert rank is not None, f"{name} is not for this rank"
            return self.files_of(rank, home)
        if not whole and name not in self._differ:
            return self.files_of(self._first_rank(name, home), home)
        return self.files_of(self._near(found.table), home)

    def _first_rank(self, name: str, home: Home) -> int:
        """The first of the ranks that held this tensor in such a file: the same for whoever asks."""
        layouts, tables = self._manifest.layouts, self._manifest.tables
        holders = [t for t in tables if name in t.tensors and layouts[t.tensors[name].layout].home == home]
        return min(table.ranks[0] for table in holders)

    def _sharded(self, found: _Found, parts: tuple[Box, ...] | None, *, whole: bool) -> list[Chunk]:
        entry, home = found.entry, found.layout.home
        zeros = (0,) * len(entry.shape)
        parts = (Box(zeros, entry.shape, zeros),) if parts is None else parts
        ranks = self._shards.of(entry, parts, near=whole, most=_MOST_CHUNKS)
        return [(self.files_of(rank, home), box) for rank, box in ranks]

    def _in_pieces(self, layout: LayoutEntry, parts: tuple[Box, ...] | None) -> list[Chunk]:
        pieces = layout.pieces
        if parts is not None:  # a look at each, once for all tensors that lie and are wanted alike
            pieces = tuple(piece for piece in pieces if any(_overlap(piece, part) for part in parts))
        zeros = (0,) * len(layout.pieces[0].offsets)
        return [(self.files_of(p.rank, layout.home), Box(p.offsets, p.lengths, zeros)) for p in pieces]


def _overlap(one: Piece, other: Box) -> bool:
    rows = zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in rows)
