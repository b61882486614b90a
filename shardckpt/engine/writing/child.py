"""What runs in the process that writes. It imports neither torch nor the training program.

It does what it is told on its line, one message after the other, and ends when the line does: with the manager, or with
the process that it writes for, whatever it hangs in then. Signals to the whole job are for that process, and not for
this one.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from shardckpt.engine.background.manners import Manners
from shardckpt.engine.writing.wire import receive, send
from shardckpt.storage.base import RenamingStorage, SharedPuts, Storage
from shardckpt.storage.open import open_storage
from shardckpt.storage.retrying import retries_of
from shardckpt.storage.transfer.pacing import Pacer


def main(line_file: int) -> None:
    """Never returns. No farewell of a client of a storage keeps the process from ending."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(line_file,), name="line", daemon=True).start()
    status = 1
    try:
        line = socket.socket(fileno=line_file)
        message, _ = receive(line)
        _serve(line, _Writer(message))
    except (EOFError, ConnectionError):
        status = 0  # nobody is there any more who wants anything written
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _end_with(line_file: int) -> None:
    """In a thread of its own: the process ends with its line, also when it hangs."""
    poll = select.poll()
    poll.register(line_file, 0)  # which is told when the other end is gone
    poll.poll()
    os._exit(0)


def _serve(line: socket.socket, writer: _Writer) -> None:
    while True:
        message, file = receive(line)
        if file is not None:
            writer.map(message["map"], file, message["nbytes"])
            continue
        before = writer.retries
        try:
            answer = writer.do(message)
        except OSError as error:
            answer = {"errno": error.errno, "error": error.strerror or str(error)}
        except Exception as error:
            answer = {"errno": None, "error": f"{type(error).__name__}: {error}"}
        send(line, {**answer, "retries": writer.retries - before})


class _Writer:
    def __init__(self, told: dict[str, Any]) -> None:
        self._storage: Storage = open_storage(told["root"], storage_options=told["options"] or None)
        manners = Manners(**told["manners"])
        manners.behave()
        self._pacer = None if manners.rate is None else Pacer(manners.rate)
        self._maps: dict[int, mmap.mmap] = {}

    def map(self, number: int, file: int, nbytes: int) -> None:
        self._maps[number] = mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED)
        os.close(file)

    @property
    def retries(self) -> int:
        return retries_of(self._storage)

    def do(self, told: dict[str, Any]) -> dict[str, Any]:
        """Put the ranges of maps that are told, one after the other. Maps that are not named any more are let go."""
        self._maps = {number: self._maps[number] for number in told["living"]}
        parts: Any = [memoryview(self._maps[number])[start:end] for number, start, end in told["parts"]]
        nbytes = sum(map(len, parts))
        if self._pacer is not None:
            parts = self._pacer.pace(parts)
        storage, key, terms = self._storage, told["key"], told["terms"]
        if told["verb"] == "put":
            return {"nbytes": storage.put(key, parts)}
        if told["verb"] == "put_range":
            assert isinstance(storage, RenamingStorage)
            return {"nbytes": storage.put_range(key, terms["offset"], parts)}
        assert isinstance(storage, SharedPuts)
        put = storage.put_parts(key, terms["upload"], parts, numbers=range(*terms["numbers"]), nbytes=nbytes)
        return {"put": [[part.number, part.tag, part.nbytes] for part in put]}


if __name__ == "__main__":
    main(int(sys.argv[1]))
