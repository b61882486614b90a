"""A gang over a gloo group made for it alone: a rank that is killed is noticed at once, and no store is polled."""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from shardckpt.errors import GangError
from shardckpt.gang.base import Fold, Gang, GatherError, Json
from shardckpt.gang.local import LocalGang
from shardckpt.gang.relay import Relay, open_by
from shardckpt.gang.store import StoreGang, last_seen
from shardckpt.gang.together import together
from shardckpt.gang.wire.gloo import LinkError, Linking, once_more
from shardckpt.gang.wire.mailbox import Line, SilentError, Store
from shardckpt.gang.wire.messages import Arrival, History, Verdict, decode, encode, judge, ranks_text
from shardckpt.gang.wire.roll import UNKNOWN, Roll, neighbours
from shardckpt.gang.wire.star import Star
from shardckpt.gang.wire.vain import Deadline

_MEETING = 1
"""The stamp of what is said at meetings, where no conversation has begun; operations have larger ones."""
_CONNECTING = 0.3, 0.6  # of the time left, for two attempts; in the rest ranks tell each other whom they waited for
_LAST_WORD_S = 1.0
"""How long a rank whose link was closed looks for what rank 0 may have left in the store. It leaves it before it hangs
up, but for one case: where a rank does not take what it is told in time, gloo closes all links by itself."""


class ProcessGroupGang:
    """A gang of processes over a gloo group of its own; see `Gang` for what its methods do.

    The training's groups are never used. The group is made at the first `enter`, and again at the first one after a
    failure, since gloo cannot mend a group: the ranks find each other through the store (a `StoreGang` with the same
    `nonce`), whether they know of the failure or only notice that their links are closed. The store is also where
    rank 0 leaves its last word for a rank that it cannot reach any more. Arguments are those of `StoreGang`;
    `interface` is the network interface to use, if not the one that this host's name leads to.
    """

    def __init__(
        self,
        make_store: Callable[[], Store],
        *,
        rank: int,
        size: int,
        nonce: str,
        name: str = "root",
        interface: str = "",
        roll: Roll = UNKNOWN,
    ) -> None:
        self._make_store = make_store
        self._interface = interface
        self._name, self._rank, self._size, self._nonce = name, rank, size, nonce
        self._meeting = StoreGang(make_store, rank=rank, size=size, nonce=nonce, name=name, roll=roll)
        self._history = History()
        self._star: Star | None = None
        self._conversation = ""
        self._operation = 0
        self._listening: set[int] = set()
        """Rank 0: those who can be told something directly."""
        self._lost: set[int] = set()
        """Rank 0: those without whom this conversation is over."""

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
        deadline, arrival = Deadline(timeout), self._history.arrive(scope, skipped)
        self._conversation, self._operation = "", 0
        self._listening, self._lost = set(range(1, self._size)), set()
        self._meeting.mailbox.renew()
        if self._star is not None and not self._star.clean:
            self._drop_star()
        verdict = self._meet_by_star(arrival, deadline)
        if verdict is None:
            self._drop_star()
            verdict = self._meeting.meet(arrival, deadline)
            if verdict.ok:
                once_more(partial(self._open_star, verdict.conversation, deadline))
        if not verdict.ok:
            raise verdict.error()
        self._conversation = verdict.conversation
        if self._lost:
            self._part({}, deadline)

    def gather(self, value: Json, *, timeout: timedelta, fold: Fold | None = None) -> list[Json] | None:
        deadline, stamp, message = Deadline(timeout), self._next_stamp(), encode(value).encode()
        if self._rank:
            self._send_up(message, stamp, deadline)
            return None
        if self._star is None or self._lost:
            lost = tuple(self._lost)
            raise GatherError(f"gang {self._name!r}: {ranks_text(lost)} was lost before", absent=lost)
        heard = self._star.collect(stamp, timeout_s=deadline.left_s(0))
        values: dict[int, Any] = {rank: decode(said) for rank, said in heard.messages.items()}
        values[0] = decode(message)
        if len(values) == self._size:
            return [values[rank] for rank in range(self._size)]
        self._listening = set(heard.messages)
        problems = [(heard.dead, "closed the connection (killed, or gone)"), (heard.astray, "is in another scope")]
        if not heard.dead and not heard.astray:
            missing = tuple(rank for rank in range(self._size) if rank not in values)
            problems = [(missing, f"did not answer within {deadline.waited_s:.3g} s")]
        self._lost = {rank for ranks, _ in problems for rank in ranks}
        text = "; ".join(f"{ranks_text(ranks)} {what}" for ranks, what in problems if ranks)
        raise GatherError(f"gang {self._name!r}: {text}", absent=sorted(self._lost), values=values)

    def broadcast(self, value: Json, *, timeout: timedelta) -> Json:
        deadline, stamp = Deadline(timeout), self._next_stamp()
        message = self._listen(stamp, deadline) if self._rank else encode(value).encode()
        if self._rank == 0:
            self._tell(message, stamp, deadline)
        heard: Json = decode(message)
        return heard

    def subgang(self, ranks: Sequence[int], name: str) -> Gang | None:
        nonce = self._meeting.subnonce(name, ranks)
        if self._rank not in ranks:
            return None
        if len(ranks) == 1:
            return LocalGang(name)
        options: dict[str, Any] = {"interface": self._interface, "roll": self._meeting.roll.of(ranks), "name": name}
        options |= {"rank": list(ranks).index(self._rank), "size": len(ranks), "nonce": nonce}
        return ProcessGroupGang(self._make_store, **options)

    def line(self) -> Line:
        return self._meeting.line()

    def open_relay(self, ranks: Sequence[int], *, name: str, timeout: timedelta) -> Relay:
        options = {"timeout": timeout, "interface": self._interface}
        return open_by(self._meeting.mailbox, ranks, self._rank, name=name, options=options)

    def close(self) -> None:
        self._conversation = ""
        self._drop_star()
        self._meeting.close()

    def _meet_by_star(self, arrival: Arrival, deadline: Deadline) -> Verdict | None:
        """Meet over the links of the last conversation; None if they do not serve any more."""
        if self._star is None:
            return None
        try:
            meet = self._answer if self._rank else self._call
            return meet(self._star, arrival, deadline)
        except LinkError:
            return None

    def _call(self, star: Star, own: Arrival, deadline: Deadline) -> Verdict | None:
        strangers: dict[int, Arrival] = {}
        while True:
            # Whoever still waits for a word of an earlier conversation, which we left without one, learns it by this.
            star.call(b"", _MEETING)
            heard = star.collect(_MEETING, timeout_s=deadline.left_s(0))
            if heard.dead or heard.astray:
                return None
            here = {rank: Arrival.from_json(decode(said)) for rank, said in heard.messages.items()}
            verdict = judge(
                {0: own, **here},
                conversation=uuid.uuid4().hex,
                gang=self._name,
                size=self._size,
                waited_s=deadline.waited_s,
                note=last_seen(strangers, here),
            )
            message = encode(verdict.to_json()).encode()
            self._lost = set(star.tell(message, _MEETING, to=here, timeout_s=deadline.left_s(0)))
            if verdict.absent:
                with suppress(GangError):  # without the store those who come late wait until their own timeout
                    self._meeting.announce(verdict, deadline)
                self._drop_star()
            if verdict.is_over_for(0):
                return verdict
            strangers |= {rank: here[rank] for rank in verdict.leave}

    def _answer(self, star: Star, own: Arrival, deadline: Deadline) -> Verdict:
        while True:
            star.listen(_MEETING, timeout_s=deadline.left_s(self._rank))
            star.send_up(encode(own.to_json()).encode(), _MEETING, timeout_s=deadline.left_s(self._rank))
            told = star.listen(_MEETING, timeout_s=deadline.left_s(self._rank))
            verdict = Verdict.from_json(decode(told))
            if verdict.is_over_for(self._rank):
                return verdict

    def _open_star(self, conversation: str, deadline: Deadline, attempt: int) -> None:
        """Make a new group; all ranks have just met through the store, and agree through it on how it went."""
        timeout, mailbox = timedelta(seconds=max(deadline.left_s(0), 1.0)), self._meeting.mailbox
        prefix, within = mailbox.key(conversation, "gloo", attempt), _CONNECTING[attempt] * timeout
        mailbox.own(f"{prefix}/0/{self._rank}")  # where gloo puts this rank's address
        others, roll = neighbours(self._rank, self._size), self._meeting.roll
        roll.call(mailbox, others, timeout_s=deadline.left_s(self._rank))
        ended = partial(roll.ended, others)
        options: dict[str, Any] = {"timeout": within, "ended": ended, "interface": self._interface}
        linking = Linking(self._make_store, f"{prefix}/failed", rank=self._rank, name=self._name, ended=ended)

        def make(store: Store) -> Star:
            below: Any = PrefixStore(prefix, store)  # type: ignore[arg-type]
            return Star.open(below, rank=self._rank, size=self._size, **options)

        def connect() -> None:
            self._star = linking.run(mailbox, make, timeout_s=within.total_seconds())

        try:
            together(self._meeting, connect, phase="connecting", timeout=timeout)
        except BaseException:
            self._drop_star()
            raise

    def _send_up(self, message: bytes, stamp: int, deadline: Deadline) -> None:
        """Give rank 0 a message. If the link is gone, the `broadcast` that follows says so."""
        if self._star is None:
            return
        try:
            self._star.send_up(message, stamp, timeout_s=deadline.left_s(self._rank))
        except LinkError:
            self._drop_star()

    def _tell(self, message: bytes, stamp: int, deadline: Deadline) -> None:
        """Tell those who listen. Whoever cannot be reached finds the message in the store, when it comes to look."""
        if self._star is not None:
            self._lost |= set(self._star.tell(message, stamp, to=self._listening, timeout_s=deadline.left_s(0)))
        if self._lost:
            self._part({self._last_word(stamp): message.decode()}, deadline)

    def _part(self, words: dict[str, Json], deadline: Deadline) -> None:
        """Rank 0 gives this conversation up: leaves words and the names of the lost in the store, then hangs up.

        In this order, so that those who notice that their link is closed find what they look for.
        """
        try:
            for key, word in {**words, self._lost_key(): sorted(self._lost)}.items():
                self._meeting.mailbox.put(key, word, timeout_s=deadline.left_s(0))
        except (SilentError, RuntimeError) as error:
            raise GangError(
                f"gang {self._name!r}: {ranks_text(self._lost)} could not be reached, neither directly nor through "
                f"the store: {error}",
                absent=sorted(self._lost),
            ) from error
        finally:
            self._drop_star()

    def _listen(self, stamp: int, deadline: Deadline) -> bytes:
        problem = "its connection was closed before"
        if self._star is not None:
            try:
                return self._star.listen(stamp, timeout_s=deadline.left_s(self._rank))
            except LinkError as error:
                problem = str(error)
                self._drop_star()
        end = time.monotonic() + _LAST_WORD_S
        while True:
            word, lost = self._words(self._last_word(stamp)), self._words(self._lost_key())
            if word is not None:
                return str(word).encode()
            if lost is not None:
                raise GangError(f"gang {self._name!r}: {ranks_text(lost)} was lost before this", absent=lost)
            if time.monotonic() > end:
                raise GangError(f"gang {self._name!r}: no word from rank 0 ({problem})", absent=[0])
            time.sleep(0.02)

    def _words(self, key: str) -> Any:
        """What rank 0 left in the store before it hung up; None if nothing, or if the store is gone with it."""
        try:
            # A store that answers does so at once; one that does not takes its time in any case.
            return self._meeting.mailbox.peek(key, timeout_s=0.0)
        except (SilentError, RuntimeError):
            return None

    def _last_word(self, stamp: int) -> str:
        return self._meeting.mailbox.key(self._conversation, "last", stamp)

    def _lost_key(self) -> str:
        return self._meeting.mailbox.key(self._conversation, "lost")

    def _next_stamp(self) -> int:
        """One per operation and conversation, the same on all ranks."""
        if not self._conversation:
            raise GangError(f"gang {self._name!r} is in no scope: call enter() first, on all ranks")
        self._operation += 1
        return zlib.crc32(self._conversation.encode()) << 24 | (_MEETING + self._operation)

    def _drop_star(self) -> None:
        star, self._star = self._star, None
        if star is not None:
            star.close()
