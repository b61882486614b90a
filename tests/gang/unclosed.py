"""`python -m tests.gang.unclosed NAME`: programs that end without closing what has threads. Both ranks are in them."""

from __future__ import annotations

import atexit
import builtins
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shardckpt.gang.halt import Halt
from shardckpt.gang.process_group import ProcessGroupGang
from shardckpt.gang.store import StoreGang
from shardckpt.gang.wire.mailbox import Mailbox

_LIMIT = timedelta(seconds=30)


class Goodbye:
    """Among the last things that the interpreter takes down: whatever waits for the store is woken only then."""

    def __init__(self) -> None:
        self.server: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        setattr(builtins, "_goodbye", self)  # noqa: B010 - no such attribute is known

    def client(self) -> Any:
        return TCPStore("127.0.0.1", self.server.port, is_master=False, wait_for_workers=False)

    def __del__(self) -> None:
        self.server = None
        time.sleep(0.5)


def halts() -> None:
    goodbye = Goodbye()
    for rank in range(2):
        gang = StoreGang(goodbye.client, rank=rank, size=2, nonce="halts")
        halt = Halt(gang, patience=_LIMIT)
        assert not halt.ask(1)


def abandoned() -> None:
    """A wait that was given up, and that is over just when the program ends."""
    goodbye = Goodbye()
    mailbox = Mailbox(goodbye.client, "abandoned", name="abandoned")
    mailbox.put(mailbox.key("mine"), 1, timeout_s=30)
    patient = threading.Thread(target=lambda: mailbox.collect({1: mailbox.key("never")}, timeout_s=1), daemon=True)
    patient.start()
    while "abandoned" not in {thread.name for thread in threading.enumerate()}:
        time.sleep(0.01)
    time.sleep(0.2)  # it is in the wait
    mailbox._watchdog.abandon()


def links() -> None:
    goodbye = Goodbye()
    gangs = [ProcessGroupGang(goodbye.client, rank=rank, size=2, nonce="links") for rank in range(2)]

    def talk(gang: ProcessGroupGang) -> None:
        gang.enter("talk", timeout=_LIMIT)
        gang.gather(gang.rank, timeout=_LIMIT)

    ranks = [threading.Thread(target=talk, args=(gang,)) for gang in gangs]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    setattr(builtins, "_gangs", gangs)  # noqa: B010 - as if a module of the program held them
    assert _of_gloo(), "there are some"
    atexit.register(lambda: print("left:", _of_gloo()))  # whoever closes them has done so before


def _of_gloo() -> list[str]:
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


PROGRAMS: dict[str, Callable[[], None]] = {each.__name__: each for each in (halts, abandoned, links)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
