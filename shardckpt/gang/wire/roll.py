"""Who the ranks are as processes: so that one that has ended is known to have, by all who live on the same machine.

A closed connection does not tell that, for a rank that gives a conversation up closes its connections as well; and
before ranks meet there may be none. Each process therefore leaves in the store of the job by what name the kernel knows
it. Of a process on another machine nothing can be told from here: it is waited for as long as the caller said.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shardckpt.gang.base import Json
from shardckpt.gang.wire.mailbox import Mailbox, collected
from shardckpt.gang.wire.messages import ranks_text

_NEAR = 16
_WORTH_S = 1.0
"""How long it is waited for what ranks leave of themselves: they do so before they are waited for, if at all."""


def own_process() -> Json:
    """This process: the boot of its machine, its name space of process ids, its id, when it was started. None where
    the system does not tell (it has no /proc)."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [machine, os.readlink("/proc/self/ns/pid"), os.getpid(), _stat(os.getpid())[1]]
    except OSError:
        return None


def has_ended(process: Any, *, own: Any) -> bool:
    """Whether that process is certainly no more. False for one of another machine or name space, or of none; `own` is
    the process that asks."""
    if not own or not process or own[:2] != process[:2]:
        return False
    try:
        state, started = _stat(process[2])
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in ("Z", "X") or started != process[3]


def _stat(pid: int) -> tuple[str, str]:
    """State and time of the start (in clock ticks since the boot), from proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    return fields[0], fields[19]


def neighbours(rank: int, size: int) -> list[int]:
    """Other ranks whose end this one may come to know of: for rank 0 all, else those of about its own number, which
    may well be of one machine."""
    near = range(max(0, rank - _NEAR), min(size, rank + _NEAR + 1))
    return sorted({0, *(near if rank else range(size))} - {rank})


class Roll:
    """The processes of a gang, as their ranks in it. Used by the gang's thread."""

    def __init__(self, prefix: str, ranks: Sequence[int], known: dict[int, Any] | None = None) -> None:
        """They are below `prefix` in the store, by the rank in the job; `ranks` are those of the gang's ranks, none
        where nothing is known of them."""
        self._prefix = prefix
        self._ranks = tuple(ranks)
        self._known: dict[int, Any] = {} if known is None else known  # of all gangs of this job

    def of(self, ranks: Sequence[int]) -> Roll:
        """For a gang of these ranks of this one."""
        return Roll(self._prefix, [self._ranks[rank] for rank in ranks], self._known) if self._ranks else self

    def call(self, mailbox: Mailbox, ranks: Iterable[int], *, timeout_s: float) -> None:
        """Learn who these are, before they are waited for."""
        if not self._ranks:
            return
        unknown = {self._ranks[rank]: rank for rank in ranks if self._ranks[rank] not in self._known}
        keys = {rank: f"{self._prefix}/{rank}" for rank in unknown}
        if keys:
            # A second of waiting is enough, but where the store is slow, all of the time that is left may pass: to make
            # a client alone takes seconds where a name server does not answer.
            learn = partial(collected, keys=keys, timeout_s=min(timeout_s, _WORTH_S))
            self._known |= dict.fromkeys(keys) | mailbox.run(learn, timeout_s=timeout_s)

    def ended(self, ranks: Iterable[int]) -> set[int]:
        """Those of them whose process has ended, as far as that can be known here."""
        if not self._ranks:
            return set()
        own = own_process()
        return {rank for rank in ranks if has_ended(self._known.get(self._ranks[rank]), own=own)}

    def obituary(self, ranks: Iterable[int]) -> str:
        """For messages: which of them have ended; "" if none is known to have."""
        ended = self.ended(ranks)
        return f" ({ranks_text(ended)} was killed, or has ended)" if ended else ""


UNKNOWN = Roll("", ())
"""Of a gang whose ranks cannot be told to have ended."""
