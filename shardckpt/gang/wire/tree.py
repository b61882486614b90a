"""Gathering over a store, through the first ranks of groups where there are many: rank 0 hears from few.

How and why is in `TREE.md`, beside this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardckpt.gang.base import Fold, Json
from shardckpt.gang.wire.mailbox import LAST_S, Mailbox, SilentError, Store, there, waited
from shardckpt.gang.wire.messages import TooLongError, decode, encode
from shardckpt.gang.wire.roll import Roll, neighbours
from shardckpt.gang.wire.vain import VainError

FLAT = 128
"""Of a gang of up to so many ranks rank 0 hears each itself."""
ENDED = "\0shardckpt: rank 0 has ended"
"""What is left in the place of rank 0's word by one who has seen it end; no message is like it."""
APIECE = None
"""What the first of a group hands on where all together are more than a store takes: rank 0 reads each itself."""
_PAUSE_S = 0.05
"""Between two looks, once somebody has ended who had given its value before."""
_READ_S = 5.0
"""How long it may take, after the deadline, to read what was never handed on."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Ranks in groups of neighbours, which mostly share a machine; the first of each hands on what the others say."""

    size: int
    width: int
    """Ranks in a group."""

    @classmethod
    def of(cls, size: int, *, flat: int = FLAT) -> Tree:
        """Rank 0 hears about twice the root of `size` others; all of them, where there are no more than `flat`."""
        return cls(size, size if size <= flat else math.isqrt(size - 1) + 1)

    @property
    def is_flat(self) -> bool:
        return self.width >= self.size

    @property
    def firsts(self) -> range:
        """The first ranks of all groups but that of rank 0, which it hears itself."""
        return range(self.width, self.size, self.width)

    def group(self, rank: int) -> range:
        """The ranks of a rank's group."""
        first = rank - rank % self.width
        return range(first, min(first + self.width, self.size))

    def heard_by(self, first: int) -> list[int]:
        """Whom the first of a group waits for; of rank 0, also the first of the others."""
        return [*self.group(first)[1:], *(self.firsts if first == 0 else ())]


@dataclass(frozen=True, slots=True)
class Round:
    """The keys of one gathering, below one prefix."""

    prefix: str

    def own(self, rank: int) -> str:
        """Where a rank leaves its value."""
        return f"{self.prefix}/{rank}"

    def bundle(self, first: int) -> str:
        """Where the first of a group leaves those of all of it, when all are there."""
        return f"{self.prefix}/to/{first}"

    def count(self, first: int) -> str:
        """How many of those that the first of a group, or rank 0, waits for have left something."""
        return f"{self.prefix}/count/{first}"

    def bell(self, first: int) -> str:
        """What it waits for: that all have, or that it is no use to wait."""
        return f"{self.prefix}/bell/{first}"


@dataclass(frozen=True, slots=True)
class Given:
    """What rank 0 got: values by rank, or, where they were folded, by the first rank of each group; and of whom."""

    values: dict[int, Any]
    present: AbstractSet[int]


class Gathering:
    """One gathering of a tree, as one rank of it takes part. `left_s` says how long this rank still waits.

    Errors are those of `Mailbox`.
    """

    def __init__(
        self, mailbox: Mailbox, tree: Tree, prefix: str, *, rank: int, roll: Roll, left_s: Callable[[], float]
    ) -> None:
        self._mailbox, self._tree, self._round = mailbox, tree, Round(prefix)
        self._rank, self._roll, self._left_s = rank, roll, left_s

    def give(self, value: Json, fold: Fold | None = None) -> None:
        """The others: leave the value; the first of a group then waits for the rest of it, and hands all on.

        It gives up, and hands nothing on, when its time is over or rank 0 has done without it.
        """
        self._mailbox.put(self._round.own(self._rank), value, timeout_s=self._left_s())
        group = self._tree.group(self._rank)
        if self._rank != group[0]:
            self._count(group[0])
            return
        others = self._tree.heard_by(self._rank)
        if others:
            self._await(self._round.bell(self._rank), others)
            said = self._read_ranks(others)
            if len(said) < len(others):
                return
            values = [value, *said.values()]
            bundle: Json = [False, values] if fold is None else [True, fold(values)]
        else:
            bundle = [False, [value]]
        try:
            self._mailbox.put(self._round.bundle(self._rank), bundle, timeout_s=self._left_s())
        except TooLongError:
            self._mailbox.put(self._round.bundle(self._rank), APIECE, timeout_s=self._left_s())
        self._count(0)

    def attend(self, key: str, left_s: Callable[[], float]) -> None:
        """The others: come back when rank 0 has written that key, when it has ended, or when the time is over.

        Meanwhile rank 0 is told which neighbours have ended before they had done their part, and the others if it is
        rank 0 that has ended.
        """
        self._left_s = left_s
        self._await(key, neighbours(self._rank, self._tree.size), of_rank_0=True)

    def hear(self) -> Given:
        """Rank 0: what all have given. Ends when all is there, when it is known that somebody will not come, or when
        the time is over; whoever has handed nothing on is passed over then, and what its group said is read."""
        self._roll.call(self._mailbox, range(1, self._tree.size), timeout_s=self._left_s())
        passed = set[int]()
        try:
            while dead := self._wait(passed):
                passed |= dead
                if len(self._read_ranks(dead)) < len(dead):
                    self._poll(lambda: set(), passed, LAST_S)
                    break
        except BaseException:
            with suppress(SilentError, RuntimeError):
                self._release(self._tree.firsts)
            raise
        return self._given()

    def _count(self, first: int) -> None:
        """One more has left something for that rank; the last one rings."""
        key, bell, expected = self._round.count(first), self._round.bell(first), len(self._tree.heard_by(first))

        def act(store: Store) -> int:
            count = store.add(key, 1)
            if count == expected:
                store.set(bell, encode([]))
            return count

        count = self._mailbox.run(act, timeout_s=self._left_s())
        if count == 1:
            self._mailbox.own(key)
        if count == expected:
            self._mailbox.own(bell)

    def _await(self, key: str, watched: Collection[int], *, of_rank_0: bool = False) -> None:
        """Until the key is there or the time is over, with an eye on ranks that may end."""
        seen = set[int]()

        def ended() -> set[int]:
            return self._roll.ended(watched) - seen

        self._roll.call(self._mailbox, watched, timeout_s=self._left_s())
        while True:
            left_s = self._left_s()
            wait = partial(waited, key=key, timeout_s=left_s)
            try:
                self._mailbox.run(wait, timeout_s=left_s, ended=ended)
                return
            except VainError as error:
                seen |= error.ranks
                if 0 in seen and of_rank_0:
                    self._mailbox.run(lambda store: store.compare_set(key, "", encode(ENDED)), timeout_s=left_s)
                    return
                self._tell_of(seen - {0})

    def _tell_of(self, ended: AbstractSet[int]) -> None:
        """Rank 0 is told that these have ended; what it has been told of others stays. Also of one that has given its
        value: it may have been killed before it was counted, and then no bell would ever ring."""
        bell = self._round.bell(0)

        def ring(store: Store) -> None:
            said = ""
            while not ended <= (known := set(decode(said)) if said else set()):
                now = store.compare_set(bell, said, encode(sorted(known | ended))).decode()
                if now == said:  # it is gone: this is over
                    return
                said = now

        self._mailbox.own(bell)
        self._mailbox.run(ring, timeout_s=self._enough_s)

    def _wait(self, passed: AbstractSet[int]) -> set[int]:
        """Rank 0: until all is there, or the time is over; or else gives those of whom it is known that they ended."""
        everyone, bell = range(1, self._tree.size), self._round.bell(0)

        def ended() -> set[int]:
            return self._roll.ended(everyone).difference(passed)

        if passed:  # the bell has been rung, or has no one to ring it
            return self._poll(ended, passed, self._left_s())
        wait = partial(waited, key=bell, timeout_s=self._left_s())
        try:
            rung = self._mailbox.run(wait, timeout_s=self._left_s(), ended=ended)
        except VainError as error:
            self._tell_of(error.ranks)  # the client that was left behind waits no longer, either
            return set(error.ranks)
        return set(self._mailbox.peek(bell, timeout_s=self._enough_s) or ()) if rung else set()

    def _poll(self, ended: Callable[[], set[int]], passed: AbstractSet[int], within_s: float) -> set[int]:
        """As `_wait`, without a bell; of groups of which one has ended, what each has given is enough."""
        end, bell = time.monotonic() + within_s, self._round.bell(0)
        needed = [self._round.own(rank) for rank in self._tree.group(0)[1:]]
        for first in self._tree.firsts:
            group = self._tree.group(first)
            needed += [self._round.bundle(first)] if passed.isdisjoint(group) else map(self._round.own, group)
        while time.monotonic() < end:
            if self._mailbox.run(lambda store: store.check(needed), timeout_s=self._enough_s):
                break
            told = set(self._mailbox.peek(bell, timeout_s=self._enough_s) or ())
            if dead := ended() | told.difference(passed):
                return dead
            time.sleep(_PAUSE_S)
        return set()

    def _given(self) -> Given:
        bundles = {self._round.bundle(first): first for first in self._tree.firsts}
        found = {key: bundle for key, bundle in self._read(list(bundles)).items() if bundle is not APIECE}
        alone = [first for key, first in bundles.items() if key not in found]
        ranks = [*self._tree.group(0)[1:], *(rank for first in alone for rank in self._tree.group(first))]
        values = self._read_ranks(ranks)
        present = set(values)
        for key, (folded, bundle) in found.items():
            group = self._tree.group(bundles[key])
            present |= set(group)
            values |= {group[0]: bundle} if folded else dict(zip(group, bundle, strict=True))
        self._release(alone)
        return Given(values, present)

    def _release(self, firsts: Iterable[int]) -> None:
        """Those that still wait for their groups need not, for what they hand on is not waited for."""
        bells = [self._round.bell(first) for first in firsts]

        def ring(store: Store) -> None:
            for bell in bells:
                store.set(bell, encode([]))

        if bells:
            for bell in bells:
                self._mailbox.own(bell)
            self._mailbox.run(ring, timeout_s=self._enough_s)

    @property
    def _enough_s(self) -> float:
        """For what needs no waiting: a store that thousands use at once may take its time."""
        return max(self._left_s(), _READ_S)

    def _read_ranks(self, ranks: Collection[int]) -> dict[int, Any]:
        """What is there of what these ranks have given, in their order."""
        keys = {self._round.own(rank): rank for rank in ranks}
        return {keys[key]: value for key, value in self._read(list(keys)).items()}

    def _read(self, keys: Sequence[str]) -> dict[str, Any]:
        return self._mailbox.run(lambda store: there(store, keys), timeout_s=self._enough_s)
