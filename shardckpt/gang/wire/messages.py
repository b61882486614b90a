"""What the ranks of a gang tell each other, as JSON, and how rank 0 judges who has come to a meeting."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import GangError
from shardckpt.gang.base import Json

_REMEMBERED = 8
"""How many scopes a rank remembers having been in: enough to tell who is behind after a few failures in a row."""


_LONG = 2048
_PACKED = b"\0z"
"""How a packed message begins; no text of JSON does."""
LONGEST = 8 << 20
"""Bytes of a message, packed, that a store takes: torch's TCPStore (2.13) hangs up on who sends it more."""


class TooLongError(RuntimeError):
    """A message that no store takes. Nothing was sent."""


def encode(value: Json) -> str:
    """JSON text of a message. `TypeError` if it holds something else than JSON."""
    return json.dumps(value, separators=(",", ":"))


def pack(value: Json) -> str | bytes:
    """A message for a store, where thousands may lie at once: long ones are compressed, for they repeat themselves.
    `TooLongError` where that is not enough."""
    text = encode(value)
    if len(text) < _LONG:
        return text
    packed = _PACKED + zlib.compress(text.encode(), 1)
    if len(packed) > LONGEST:
        raise TooLongError(f"a message of {len(packed)} bytes, packed; a store takes {LONGEST}")
    return packed


def decode(text: str | bytes) -> Any:
    """The value of a message, packed or not; it is what was given, but for tuples, which come back as lists."""
    if isinstance(text, bytes) and text.startswith(_PACKED):
        text = zlib.decompress(text[len(_PACKED) :])
    return json.loads(text)


def ranks_text(ranks: Iterable[int]) -> str:
    """For people: "rank 3", "ranks 0-2, 7"."""
    ordered = sorted(set(ranks))
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    named = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {named}" if len(ordered) == 1 else f"ranks {named}"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a rank says when it comes to a meeting."""

    scope: str
    past: tuple[str, ...]
    """The scopes that it was in before, the newest last: they tell who is behind when two ranks disagree."""

    def to_json(self) -> Json:
        return [self.scope, list(self.past)]

    @classmethod
    def from_json(cls, value: Any) -> Arrival:
        return cls(value[0], tuple(value[1]))


class History:
    """The scopes that this rank has been in. One per gang, used by the thread that uses the gang."""

    def __init__(self) -> None:
        self._past: deque[str] = deque(maxlen=_REMEMBERED)
        self._skipped: tuple[str, ...] = ()

    def arrive(self, scope: str, skipped: Sequence[str] = ()) -> Arrival:
        """What to say at the meeting for `scope`; from the next meeting on it belongs to the past, as `skipped` does
        now. The same may be given again: what is past for long makes nobody forget what has just been."""
        self._past.extend(s for s in skipped if s not in self._skipped and s not in self._past)
        self._skipped = tuple(skipped)
        arrival = Arrival(scope, tuple(self._past))
        self._past.append(scope)
        return arrival


@dataclass(frozen=True, slots=True)
class Verdict:
    """What rank 0 says of one meeting, the same to all ranks. The conversation begins if `text` is empty."""

    conversation: str
    """An id that was never used before: the messages of other conversations cannot be taken for ours."""
    scope: str
    """Rank 0's scope."""
    text: str = ""
    leave: tuple[int, ...] = ()
    """The ranks that give up now. The others meet again, if any came for the scope that these were behind of."""
    absent: tuple[int, ...] = field(default=())

    def to_json(self) -> Json:
        return [self.conversation, self.scope, self.text, self.leave, self.absent]

    @classmethod
    def from_json(cls, value: Any) -> Verdict:
        return cls(value[0], value[1], value[2], tuple(value[3]), tuple(value[4]))

    @property
    def ok(self) -> bool:
        return not self.text

    def is_over_for(self, rank: int) -> bool:
        """False if this rank came for a scope that others are behind of, and so meets again."""
        return self.ok or bool(self.absent) or rank in self.leave

    def error(self) -> GangError:
        return GangError(self.text, absent=self.absent)


def judge(
    arrivals: Mapping[int, Arrival], *, conversation: str, gang: str, size: int, waited_s: float, note: str = ""
) -> Verdict:
    """Rank 0's verdict on those who came: all in one scope, or else who was where and who gives up.

    Where ranks are in different scopes, those give up who are in a scope that another has already left:
    they are behind, for example because the other raised before it came to that meeting. The ones ahead
    wait for them, so that one failure costs one conversation and not one at every rank in turn. When
    nobody can be told to be behind, all give up (and know each other's past the next time).
    """
    scope = arrivals[0].scope
    absent = tuple(rank for rank in range(size) if rank not in arrivals)
    by_scope: dict[str, list[int]] = {}
    for rank in sorted(arrivals):
        by_scope.setdefault(arrivals[rank].scope, []).append(rank)
    if len(by_scope) == 1 and not absent:
        return Verdict(conversation, scope)
    problems = []
    if len(by_scope) > 1:
        places = " while ".join(f"{_are(ranks)} in scope {place!r}" for place, ranks in by_scope.items())
        problems.append(f"{places}; all ranks must enter the same scopes in the same order")
    if absent:
        problems.append(f"{ranks_text(absent)} did not come to scope {scope!r} within {waited_s:.3g} s{note}")
    behind = _behind(arrivals)
    leave = behind if behind and len(behind) < len(arrivals) else tuple(sorted(arrivals))
    return Verdict(conversation, scope, f"gang {gang!r}: {'; '.join(problems)}", leave, absent)


def _behind(arrivals: Mapping[int, Arrival]) -> tuple[int, ...]:
    """The ranks whose scope another rank, which is elsewhere now, has already left."""
    left = [(arrival.scope, arrival.past) for arrival in set(arrivals.values())]
    return tuple(
        rank
        for rank in sorted(arrivals)
        if any(arrivals[rank].scope in past and now != arrivals[rank].scope for now, past in left)
    )


def _are(ranks: Sequence[int]) -> str:
    return f"{ranks_text(ranks)} {'is' if len(ranks) == 1 else 'are'}"
