"""Halt: all ranks stop at one common step, though only one of them was told to stop.

Until somebody asks for it, a step costs each rank a lock and a comparison, and nothing travels. Then, in a thread of
each rank, past whatever the training and the conversations of the gang are doing:

    any rank     rings rank 0
    rank 0       rings all others
    every rank   lets its training come no further than its next question, and says what it has answered last
    rank 0       announces the step after the highest of these, and all go on

No rank has passed that step, and every rank comes to it: it is the same on all. What training waits for are threads of
other ranks and never their training, so that a rank which waits in a collective holds nobody up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

from shardckpt.gang.base import Gang, Json
from shardckpt.gang.wire.ending import close_at_the_end
from shardckpt.gang.wire.mailbox import Line, Mailbox, SilentError, Store
from shardckpt.gang.wire.messages import decode, encode, ranks_text

_log = logging.getLogger(__name__)

_REQUEST, _NOTICE, _CLOSE = "request", "notice", "close"
_LONG = timedelta(days=10)
"""How long one wait for a bell may take; torch logs a line at its end."""
_FAREWELL_S = 2.0
"""How long `close` tries to end the threads of this rank."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the ranks agreed on."""

    step: int
    """All stop at the first step they ask about that is not before this one."""
    reason: str
    absent: tuple[int, ...] = ()
    """Ranks that did not answer: what all ranks do together cannot succeed any more."""


class Halt:
    """One rank's part. Made and closed by all ranks of a gang that is used for nothing else; serves once.

    Args:
        gang: its conversations are not used, only its store; one rank by itself needs none.
        patience: how long a rank whose training waits for the decision waits at most. Without an answer by then it
            decides for itself, and stops at its next step.
        on_decision: called in a thread of this rank, before the first `ask` that says so returns.
    """

    def __init__(
        self, gang: Gang, *, patience: timedelta, on_decision: Callable[[Decision], None] = lambda decision: None
    ) -> None:
        self._rank, self._size = gang.rank, gang.size
        self._patience_s = patience.total_seconds()
        self._on_decision = on_decision
        self._lock = threading.Lock()
        self._answered = -1
        """The highest step to which the answer was no."""
        self._agreeing = False
        self._decision: Decision | None = None
        self._decided = threading.Event()
        self._inbox: SimpleQueue[tuple[str, str]] = SimpleQueue()  # whose `put` may be called in a signal handler
        self._thread: threading.Thread | None = None
        line = gang.line()
        if line is not None:
            name = f"shardckpt-halt-{self._rank}"
            self._line = line
            self._mailbox = Mailbox(line.make_store, line.prefix, name=f"{name}-store")
            self._bell = threading.Thread(target=self._listen, args=(line,), name=f"{name}-bell", daemon=True)
            self._thread = threading.Thread(target=self._attend, name=name, daemon=True)
            self._bell.start()
            self._thread.start()
            close_at_the_end(self)

    @property
    def decision(self) -> Decision | None:
        """What was decided; None as long as nobody has asked for it or the ranks are about to agree."""
        return self._decision

    def request(self, reason: str) -> None:
        """Ask all ranks to stop. By any thread of any rank, also in a signal handler; again changes nothing."""
        self._inbox.put((_REQUEST, reason))

    def ask(self, step: int) -> bool:
        """Whether to stop at this step; the same on all ranks. Called by all ranks for the same, rising steps.

        To ask again about a step gives the same answer.
        """
        if self._thread is None and self._decision is None and not self._inbox.empty():
            self._decide(Decision(self._answered + 1, self._inbox.get()[1]))
        with self._lock:
            if self._decision is None and (not self._agreeing or step <= self._answered):
                self._answered = max(self._answered, step)
                return False
        self._decided.wait()  # the other thread sees to it that this ends
        assert self._decision is not None
        return step >= self._decision.step

    def close(self) -> None:
        """End the threads; waits for no other rank. A rank that asks for a stop afterwards does without this one."""
        self._inbox.put((_CLOSE, ""))
        if self._thread is not None:
            self._thread.join(2 * _FAREWELL_S)

    def _attend(self) -> None:
        """In the thread of its own: do what is asked for, until closed."""
        deadline: float | None = None
        while True:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                kind, reason = self._inbox.get(timeout=left)
            except Empty:
                kind, deadline = _NOTICE, None
            if kind == _CLOSE:
                break
            if self._decision is not None or (kind == _REQUEST and deadline is not None):
                continue
            if kind == _REQUEST and self._rank:
                heard = self._ring(0, reason)
                deadline = time.monotonic() + (self._patience_s if heard else 0.0)  # and then without rank 0
                continue
            deadline = None
            self._agree(reason)
        if self._bell.is_alive():
            self._ring(self._rank, "")
            self._bell.join(_FAREWELL_S)
        self._mailbox.close()

    def _agree(self, reason: str) -> None:
        with self._lock:
            self._agreeing, answered = True, self._answered
        try:
            decision = self._lead(answered, reason) if self._rank == 0 else self._follow(answered)
        except Exception as error:  # the store is gone, or does not answer: nobody can be told anything any more
            _log.warning("this rank stops without having heard of the others: %s", error)
            decision = Decision(answered + 1, reason, tuple(rank for rank in range(self._size) if rank != self._rank))
        self._decide(decision)

    def _lead(self, answered: int, reason: str) -> Decision:
        """Rank 0: ring all, hear how far they are, say where all stop."""
        others = range(1, self._size)

        def ring(store: Store) -> None:
            for rank in others:
                store.set(self._line.key("bell", rank), encode(reason))

        self._mailbox.run(ring, timeout_s=self._patience_s)
        keys = {rank: self._line.key("answered", rank) for rank in others}
        heard = self._mailbox.collect(keys, timeout_s=self._patience_s)
        absent = tuple(rank for rank in others if rank not in heard)
        decision = Decision(max([answered, *heard.values()]) + 1, reason, absent)
        message: Json = [decision.step, decision.reason, list(absent)]
        self._mailbox.put(self._line.key("stop"), message, timeout_s=self._patience_s)
        return decision

    def _follow(self, answered: int) -> Decision:
        self._mailbox.put(self._line.key("answered", self._rank), answered, timeout_s=self._patience_s)
        keys = {0: self._line.key("stop")}
        heard: dict[int, Any] = self._mailbox.collect(keys, timeout_s=1.5 * self._patience_s)  # it waits for others
        if not heard:
            raise SilentError("rank 0 did not answer")
        step, reason, absent = heard[0]
        return Decision(step, reason, tuple(absent))

    def _decide(self, decision: Decision) -> None:
        if decision.absent:
            _log.warning("%s did not answer: what they hold cannot be saved", ranks_text(decision.absent))
        try:
            self._on_decision(decision)
        except Exception:
            _log.exception("what was to be done at the decision to stop failed")
        self._decision = decision
        self._decided.set()

    def _ring(self, rank: int, reason: str) -> bool:
        """Ring one bell. It may be heard and taken away before this returns, so nobody looks whether it is there."""
        bell, message = self._line.key("bell", rank), encode(reason)
        try:
            self._mailbox.run(lambda store: store.set(bell, message), timeout_s=_FAREWELL_S)
        except (SilentError, RuntimeError):
            return False
        return True

    def _listen(self, line: Line) -> None:
        """In a thread of its own, with a client of its own: wait until this rank's bell is rung, once."""
        bell = line.key("bell", self._rank)
        try:
            store = line.make_store()
            while not _waited(store, bell):
                pass
            self._inbox.put((_NOTICE, decode(store.get(bell))))
            store.delete_key(bell)
        except RuntimeError as error:  # the store is gone, as it is at the end of a job
            _log.debug("rank %d does not hear the others any more: %s", self._rank, error)


def _waited(store: Store, key: str) -> bool:
    """Whether it is there; False after a long time."""
    began = time.monotonic()
    try:
        store.wait([key], _LONG)
    except RuntimeError:
        if time.monotonic() - began < 0.9 * _LONG.total_seconds():
            raise
        return False
    return True
