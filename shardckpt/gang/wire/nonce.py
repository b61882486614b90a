"""How processes that share nothing but a store agree on a word that nobody has used on it before."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from shardckpt.errors import GangError
from shardckpt.gang.wire.mailbox import Mailbox, SilentError, Store
from shardckpt.gang.wire.messages import ranks_text
from shardckpt.gang.wire.roll import Roll, own_process

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25
_BLOCK = 64
"""Ranks whose words are repeated in one place."""


def agree_on_nonce(
    make_store: Callable[[], Store], *, place: str, rank: int, size: int, label: str, timeout: timedelta
) -> str:
    """Rank 0 draws a nonce (which begins with its `label`), and all learn it. Called by all `size` ranks, once each.

    The store may hold what an earlier generation of the job left there: torchelastic gives the restarted workers the
    same store again (pytorch#135712). So the others do not trust what they find below `place`: they answer with a word
    of their own, and believe a nonce when rank 0 has repeated that word. `GangError` names the ranks that did not come.
    """
    mailbox = Mailbox(make_store, f"shardckpt/{place}", name=f"shardckpt-nonce-{rank}")
    end = time.monotonic() + timeout.total_seconds()
    try:
        if rank == 0:
            return _draw(mailbox, size, f"{label}-{uuid.uuid4().hex}", end)
        return _learn(mailbox, rank, end)
    except (SilentError, RuntimeError) as error:
        raise GangError(
            f"rank {rank} cannot use the store of this job: {error}. Check MASTER_ADDR and MASTER_PORT, and that the "
            "process that hosts the store is alive"
        ) from error
    finally:
        mailbox.close()


def roll_of(*, place: str, nonce: str, size: int) -> Roll:
    """The processes that have agreed on that nonce there."""
    return Roll(f"shardckpt/{place}/{nonce}/process", range(size))


def _draw(mailbox: Mailbox, size: int, nonce: str, end: float) -> str:
    mailbox.put(mailbox.key(nonce, "process", 0), own_process(), timeout_s=_left_s(end))
    mailbox.put(mailbox.key("call"), nonce, timeout_s=_left_s(end))
    keys = {rank: mailbox.key(nonce, rank) for rank in range(1, size)}
    words = mailbox.collect(keys, timeout_s=_left_s(end))
    absent = [rank for rank in keys if rank not in words]
    for block in range(0, size, _BLOCK):
        heard = {str(rank): words[rank] for rank in range(block, min(block + _BLOCK, size)) if rank in words}
        mailbox.put(_heard(mailbox, nonce, block), [heard, absent], timeout_s=_left_s(end))
    if absent:
        raise _missing(absent)
    return nonce


def _learn(mailbox: Mailbox, rank: int, end: float) -> str:
    word, answered, pause_s = uuid.uuid4().hex, "", _SHORTEST_PAUSE_S
    while time.monotonic() < end + 1.0:  # a little longer than rank 0, to learn who was missing
        called = mailbox.collect({0: mailbox.key("call")}, timeout_s=_left_s(end))
        if called and called[0] != answered:
            answered = str(called[0])
            mailbox.put(mailbox.key(answered, "process", rank), own_process(), timeout_s=_left_s(end))
            mailbox.put(mailbox.key(answered, rank), word, timeout_s=_left_s(end))
        if answered:
            verdict = mailbox.peek(_heard(mailbox, answered, rank), timeout_s=_left_s(end))
            if verdict and verdict[0].get(str(rank)) == word:
                if verdict[1]:
                    raise _missing(verdict[1])
                mailbox.delete(mailbox.key(answered, rank), timeout_s=_left_s(end))
                return answered
        time.sleep(pause_s)  # polls, because what changes is the value of a key, and a store only waits for new keys
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    raise _missing([0])


def _heard(mailbox: Mailbox, nonce: str, rank: int) -> str:
    """Where rank 0 repeats the words of a rank and some others: all in one place would be read by all of them."""
    return mailbox.key(nonce, "heard", rank // _BLOCK)


def _missing(absent: list[int]) -> GangError:
    return GangError(
        f"{ranks_text(absent)} did not come: all ranks make their gangs at the same point of the program", absent=absent
    )


def _left_s(end: float) -> float:
    return max(end - time.monotonic(), 0.0)
