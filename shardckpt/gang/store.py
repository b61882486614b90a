"""A gang that talks through a `torch.distributed` store: ranks as threads, or where no process group can be made."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from shardckpt.errors import GangError
from shardckpt.gang.base import Fold, Gang, GatherError, Json
from shardckpt.gang.local import LocalGang
from shardckpt.gang.wire.mailbox import Line, Mailbox, SilentError, Store
from shardckpt.gang.wire.messages import Arrival, History, TooLongError, Verdict, decode, encode, judge, ranks_text
from shardckpt.gang.wire.roll import UNKNOWN, Roll
from shardckpt.gang.wire.tree import ENDED, FLAT, Gathering, Tree
from shardckpt.gang.wire.vain import Deadline

if TYPE_CHECKING:
    from shardckpt.gang.relay import Relay

_HERE, _ELSEWHERE = "here", "elsewhere"
"""Where a meeting that is called for is held. One held elsewhere is over: the call is for those who missed it."""


class StoreGang:
    """A gang over any store of `torch.distributed`; see `Gang` for what its methods do.

    `make_store` gives a client for one thread (`lambda: store` for a HashStore, `store.clone` for a TCPStore); it is
    called in a worker thread, again after each failure of the store. `nonce` is the same on all ranks and was never
    used on this store before; `rank`, `size` and `name` are those of this gang.

    Keys, below `shardckpt/<nonce>`: rank 0 numbers its calls for a meeting (`call/7`); each names a conversation, an
    id that is never used twice. Whoever hears the call answers (`<id>/here/3`) and waits for `<id>/verdict`. Everything
    said in the conversation is below its id and numbered by operation (`<id>/0/3` given by rank 3, `<id>/1` broadcast).
    Where there are many ranks, some hand on what others give (`wire/TREE.md`).
    So a message that comes late is in a place where nobody looks, and a rank that comes late finds a verdict that
    says so. A key is deleted by its writer as soon as a later operation proves that all readers have passed it.
    """

    def __init__(
        self,
        make_store: Callable[[], Store],
        *,
        rank: int,
        size: int,
        nonce: str,
        name: str = "root",
        roll: Roll = UNKNOWN,
        flat: int = FLAT,
    ) -> None:
        """`roll`: its ranks as processes, where that is known. One that has ended is then not waited for. `flat`: up to
        so many ranks rank 0 hears each itself."""
        self._make_store = make_store
        self.roll = roll
        self._flat, self._tree = flat, Tree.of(size, flat=flat)
        self._given: Gathering | None = None
        """The last one of a tree that this rank, not rank 0, has taken part in."""
        self._name, self._rank, self._size, self._nonce = name, rank, size, nonce
        self.mailbox = Mailbox(make_store, f"shardckpt/{nonce}", name=f"shardckpt-{name}-{rank}")
        self._history = History()
        self._subgangs: Counter[str] = Counter()
        self._calls = 0
        self._conversation = ""
        self._operation = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def enter(self, scope: str, *, timeout: timedelta, skipped: Sequence[str] = ()) -> None:
        self._conversation = ""
        verdict = self.meet(self._history.arrive(scope, skipped), Deadline(timeout))
        if not verdict.ok:
            raise verdict.error()

    def gather(self, value: Json, *, timeout: timedelta, fold: Fold | None = None) -> list[Json] | None:
        deadline, operation = Deadline(timeout), self._next_operation()
        if self._rank:
            self._give(self._said(operation), value, deadline, fold)
            return None
        own = decode(encode(value))
        values, present = self._heard(self._said(operation), deadline)
        values[0] = own
        absent = [rank for rank in range(1, self._size) if rank not in present]
        if absent:
            note = self.roll.obituary(absent)
            raise GatherError(
                f"gang {self._name!r}: {ranks_text(absent)} did not answer within {deadline.waited_s:.3g} s{note}",
                absent=absent,
                values=values,
            )
        self.mailbox.forget(before=self.mailbox.stage)  # who took part in this has read all that I wrote before it
        return [values[rank] for rank in sorted(values)]

    def broadcast(self, value: Json, *, timeout: timedelta) -> Json:
        deadline, operation = Deadline(timeout), self._next_operation()
        if self._rank == 0:
            self._put(self._said(operation), value, deadline)
            own: Json = decode(encode(value))
            return own
        heard: Json = self._hear(self._said(operation), deadline)
        self.mailbox.forget(before=self.mailbox.stage)  # rank 0 has done with all operations before this one
        return heard

    def subgang(self, ranks: Sequence[int], name: str) -> Gang | None:
        nonce = self.subnonce(name, ranks)
        if self._rank not in ranks:
            return None
        if len(ranks) == 1:
            return LocalGang(name)
        own = list(ranks).index(self._rank)
        roll, flat = self.roll.of(ranks), self._flat
        return StoreGang(self._make_store, rank=own, size=len(ranks), nonce=nonce, name=name, roll=roll, flat=flat)

    def subnonce(self, name: str, ranks: Sequence[int]) -> str:
        """A nonce for the next subgang of that name; counted by all ranks of this gang, also by those outside."""
        self._subgangs[name] += 1
        members = uuid.uuid5(uuid.NAMESPACE_OID, "-".join(map(str, ranks))).hex[:16]
        return f"{self._nonce}/{name}.{self._subgangs[name]}.{members}"

    def line(self) -> Line:
        return Line(self._make_store, f"shardckpt/{self._nonce}/line")

    def open_relay(self, ranks: Sequence[int], *, name: str, timeout: timedelta) -> Relay:
        from shardckpt.gang.relay import open_by  # needs torch

        return open_by(self.mailbox, ranks, self._rank, name=name, options={"timeout": timeout})

    def close(self) -> None:
        self._conversation = ""
        self.mailbox.close()

    def meet(self, arrival: Arrival, deadline: Deadline) -> Verdict:
        """All ranks meet, and rank 0 says how it went; every rank gets the same verdict, unless it raises.

        Called by `enter`, and by a gang that needs this only now and then.
        """
        self._given = None
        self.mailbox.renew()
        verdict = self._call(arrival, deadline) if self._rank == 0 else self._answer(arrival, deadline)
        if verdict.ok:
            self._conversation, self._operation = verdict.conversation, 0
            self.mailbox.forget(before=self.mailbox.stage)  # whoever is here has left all earlier conversations
        return verdict

    def announce(self, verdict: Verdict, deadline: Deadline) -> None:
        """Rank 0: leave word of a meeting that was held elsewhere and failed, for those who come late and look here."""
        self.mailbox.stage += 1
        self._put(self._free_call(deadline), [verdict.conversation, verdict.scope, _ELSEWHERE], deadline)
        self._calls += 1
        self._put(self.mailbox.key(verdict.conversation, "verdict"), verdict.to_json(), deadline)

    def _call(self, own: Arrival, deadline: Deadline) -> Verdict:
        """Rank 0: call, see who comes, judge; call again as long as those who came can wait for the others."""
        strangers: dict[int, Arrival] = {}
        while True:
            self.mailbox.stage += 1
            conversation = uuid.uuid4().hex
            self._put(self._free_call(deadline), [conversation, own.scope, _HERE], deadline)
            self._calls += 1
            with self._farewell(conversation, own, deadline):
                came, _ = self._heard(self.mailbox.key(conversation, "here"), deadline)
            here = {rank: Arrival.from_json(said) for rank, said in came.items()}
            verdict = judge(
                {0: own, **here},
                conversation=conversation,
                gang=self._name,
                size=self._size,
                waited_s=deadline.waited_s,
                note=last_seen(strangers, here) + self.roll.obituary(set(range(1, self._size)) - here.keys()),
            )
            self._put(self.mailbox.key(conversation, "verdict"), verdict.to_json(), deadline)
            if verdict.is_over_for(0):
                return verdict
            strangers |= {rank: here[rank] for rank in verdict.leave}

    def _answer(self, own: Arrival, deadline: Deadline) -> Verdict:
        """The others: answer each call in turn, until a verdict is meant for us."""
        while True:
            conversation, scope, where = self._hear(self.mailbox.key("call", self._calls), deadline)
            self._calls += 1
            self.mailbox.stage += 1
            if where == _HERE:
                self._give(self.mailbox.key(conversation, "here"), own.to_json(), deadline)
            verdict = Verdict.from_json(self._hear(self.mailbox.key(conversation, "verdict"), deadline))
            if self._rank in verdict.absent:
                # This meeting was over before we came. If it was the one we are looking for, say so at once. If we
                # have been in this scope before, then rank 0 may be about to call for it again.
                if scope == own.scope and scope not in own.past:
                    return verdict
            elif where == _HERE and verdict.is_over_for(self._rank):
                return verdict

    def _free_call(self, deadline: Deadline) -> str:
        """The key for the next call; a call that seemed to fail may have been heard, and its number is then used up."""
        while True:
            key = self.mailbox.key("call", self._calls)
            with self._translated():
                if self.mailbox.peek(key, timeout_s=deadline.left_s(0)) is None:
                    return key
            self._calls += 1

    @contextmanager
    def _farewell(self, conversation: str, own: Arrival, deadline: Deadline) -> Iterator[None]:
        """If rank 0 is interrupted (Ctrl-C) while the others wait for its verdict, they hear of it."""
        try:
            yield
        except GangError:
            raise  # the store itself failed: nobody can hear us
        except BaseException:
            text = f"gang {self._name!r}: rank 0 was interrupted"
            verdict = Verdict(conversation, own.scope, text, absent=(0,))
            with suppress(GangError):
                self._put(self.mailbox.key(conversation, "verdict"), verdict.to_json(), deadline)
            raise

    def _next_operation(self) -> int:
        if not self._conversation:
            raise GangError(f"gang {self._name!r} is in no scope: call enter() first, on all ranks")
        self.mailbox.stage += 1
        self._operation += 1
        return self._operation

    def _said(self, *where: int) -> str:
        return self.mailbox.key(self._conversation, *where)

    def _put(self, key: str, value: Json, deadline: Deadline) -> None:
        with self._translated():
            self.mailbox.put(key, value, timeout_s=deadline.left_s(self._rank))

    def _give(self, prefix: str, value: Json, deadline: Deadline, fold: Fold | None = None) -> None:
        """The others: give rank 0 a value."""
        if self._tree.is_flat:
            self._put(f"{prefix}/{self._rank}", value, deadline)
            return
        with self._translated():
            self._given = self._gathering(prefix, deadline)
            self._given.give(value, fold)

    def _heard(self, prefix: str, deadline: Deadline) -> tuple[dict[int, Any], Collection[int]]:
        """Rank 0: what the others give, and who has given something."""
        if self._tree.is_flat:
            values = self._collect({rank: f"{prefix}/{rank}" for rank in range(1, self._size)}, deadline)
            return values, values.keys()
        with self._translated():
            given = self._gathering(prefix, deadline).hear()
        return given.values, given.present

    def _gathering(self, prefix: str, deadline: Deadline) -> Gathering:
        left_s = partial(deadline.left_s, self._rank)
        return Gathering(self.mailbox, self._tree, prefix, rank=self._rank, roll=self.roll, left_s=left_s)

    def _collect(self, keys: dict[int, str], deadline: Deadline) -> dict[int, Any]:
        with self._translated():
            self.roll.call(self.mailbox, keys, timeout_s=deadline.left_s(self._rank))
            ended = partial(self.roll.ended, list(keys))
            return self.mailbox.collect(keys, timeout_s=deadline.left_s(self._rank), ended=ended)

    def _hear(self, key: str, deadline: Deadline) -> Any:
        """What rank 0 says under `key`."""
        if self._given is not None:
            with self._translated():
                self._given.attend(key, partial(deadline.left_s, self._rank))
        heard = self._collect({0: key}, deadline)
        if not heard or heard[0] == ENDED:
            waited = f"within {deadline.waited_s:.3g} s{self.roll.obituary([0])}"
            raise GangError(f"gang {self._name!r}: rank 0 did not answer {waited}", absent=[0])
        return heard[0]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TooLongError as error:
            raise GangError(f"gang {self._name!r}: {error}") from error
        except (SilentError, RuntimeError) as error:
            missed = "rank 0" if self._rank else "the others"
            raise GangError(
                f"gang {self._name!r}: rank {self._rank} does not reach {missed}: the store that they talk through "
                f"failed: {error}. The process that hosts it may have ended, or the network to it may be cut",
                absent=[0] if self._rank else (),
            ) from error


def last_seen(strangers: dict[int, Arrival], here: dict[int, Arrival]) -> str:
    """For the verdict: where those were who were sent away to come again and did not."""
    seen = [f"rank {rank} was in {at.scope!r} before" for rank, at in strangers.items() if rank not in here]
    return f" ({', '.join(seen[:8])})" if seen else ""
