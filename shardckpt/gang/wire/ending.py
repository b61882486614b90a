"""What must be over before the interpreter takes itself down.

A thread that wants to run Python from then on is ended where it stands. Where it comes from C++ the process aborts
instead ("terminate called without an active exception", status -6), though all its work was done, and torchrun takes
the job for a failed one. Two kinds of threads come back from C++ at any time (each tried with torch 2.13): our own
that wait for a TCPStore, and gloo's, which let go of the tensors of an operation some time after it is over.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from typing import Any, NoReturn, Protocol

_log = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""How long threads of clients that were given up are waited for, all together: some may hang."""


class Ends(Protocol):
    """Has threads, and can end them. Doing so again, or late, does no harm."""

    def close(self) -> None: ...


_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Ends] = weakref.WeakValueDictionary()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def close_at_the_end(thing: Ends) -> None:
    """If nobody has closed it by then: what was made last is closed first."""
    _open[next(_numbers)] = thing


def join_at_the_end(thread: threading.Thread) -> None:
    """It ends as soon as its present call does, and is then not to be met halfway."""
    _threads.add(thread)


def leave(status: int = 0) -> NoReturn:
    """End this process with all that programs do at their end, but without taking the interpreter down.

    A thread of torch's gloo groups lets go of the tensors of a collective some time after it is over, and often as the
    last one: then it needs Python, and aborts the process if that is being taken down (status -6; torch 2.13; 4 of 10
    processes whose gloo threads had been made slow). `destroy_process_group` ends these threads only if no device mesh
    holds the group. Called on the main thread, as the last thing.
    """
    shut_down: Any = threading._shutdown  # type: ignore[attr-defined]
    shut_down()  # the end of threads, and what is to be done before anything else
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _end() -> None:
    for _, thing in sorted(_open.items(), reverse=True):
        try:
            thing.close()
        except Exception:
            _log.debug("%r could not be closed at the end of the program", thing, exc_info=True)
    end = time.monotonic() + _PATIENCE_S
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))


def _forget() -> None:
    """In a forked child: the links are its parent's, and the threads are not there."""
    _open.clear()
    _threads.clear()


os.register_at_fork(after_in_child=_forget)
# Hooks run last in, first out: what is registered later, as that of the save threads, still finds its gangs open.
_register = getattr(threading, "_register_atexit", atexit.register)  # as `concurrent.futures` does, Python >= 3.9
_register(_end)
