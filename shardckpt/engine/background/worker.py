"""A thread that does one job after the other, and that another takes the place of when it has died or hangs."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # its exit hook, and that of gangs, before ours: hooks run last in, first out
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import shardckpt.gang.wire.ending

_log = logging.getLogger(__name__)
assert concurrent.futures.thread
assert shardckpt.gang.wire.ending

_LIVING: weakref.WeakSet[Worker] = weakref.WeakSet()
"""Of this process: those who are let end before the interpreter takes away what they need (see `_let_end`)."""


_LINGER_S = 30.0
"""How long a thread waits for another job before it ends: a worker that nobody closes leaves none behind."""


_ENDING = threading.Event()


def is_ending() -> bool:
    """Whether the program is over, and only what it has begun is still done: nobody looks at errors any more."""
    return _ENDING.is_set()


class WorkerLostError(RuntimeError):
    """The thread that did this job was ended from outside, or was given up."""


class Worker:
    """Does jobs in the order in which they are given. Any thread may give them.

    The thread is a daemon, so that one that hangs for ever does not keep the process from ending; at the end of the
    interpreter all jobs that were given are done first. It is started at the first job, and anew when it has died: a
    job is taken out of the queue only when it is over, so none is lost with its thread. One that had begun fails.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        _LIVING.add(self)

    def submit(self, act: Callable[[], object]) -> Future[None]:
        """Have `act` done after all that was given before. Its result is dropped, its error is the future's."""
        job = _Job(act)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            self._jobs.append(job)
            self._revive()
            self._changed.notify()
        return job.future

    def give_up(self, hung: Future[None]) -> None:
        """Let go of the thread if it hangs in this job: that fails now, and a new thread does the next."""
        with self._changed:
            if self._jobs and self._jobs[0].future is hung and self._jobs[0].begun:
                self._thread = None
                self._revive()

    def close(self) -> None:
        """Take no more jobs, and wait until those that were given are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.join()

    def join(self) -> None:
        """Wait until nothing is left to do; of a closed worker, until its thread has ended."""
        while True:
            with self._changed:
                self._revive()
                thread, last = self._thread, self._jobs[-1] if self._jobs else None
            if last is not None:
                concurrent.futures.wait([last.future])  # and look again: its thread may have been given up in it
            elif self._closed and thread is not None:
                thread.join()
            else:
                return

    def _revive(self) -> None:
        """Under the lock: see to it that somebody does what is to be done."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = None
        while self._jobs and self._jobs[0].begun:
            self._jobs.popleft().lose(self._name)
        if self._jobs:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        try:
            while (job := self._next(me)) is not None:
                job.do()
                self._finished(job)
        finally:
            with self._changed:
                if self._thread is me:
                    self._thread = None  # it may be alive for a moment yet
                    self._revive()

    def _next(self, me: threading.Thread) -> _Job | None:
        with self._changed:
            while self._thread is me and not self._jobs and not self._closed:
                if not self._changed.wait(_LINGER_S):
                    break
            return self._jobs[0] if self._thread is me and self._jobs else None

    def _finished(self, job: _Job) -> None:
        with self._changed:
            if self._jobs and self._jobs[0] is job:
                self._jobs.popleft()


class _Job:
    def __init__(self, act: Callable[[], object]) -> None:
        self.future: Future[None] = Future()
        self.begun = False
        self._act = act

    def do(self) -> None:
        self.begun = True
        try:
            self._act()
        except BaseException as error:
            self._settle(error)
        else:
            self._settle(None)

    def lose(self, name: str) -> None:
        self._settle(WorkerLostError(f"the thread {name!r} was ended, or hung, in the middle of its work"))

    def _settle(self, error: BaseException | None) -> None:
        try:
            if error is None:
                self.future.set_result(None)
            else:
                self.future.set_exception(error)
        except concurrent.futures.InvalidStateError:
            _log.debug("a job that was given up has ended after all", exc_info=error)


def _let_end() -> None:
    """At the end of the interpreter, before anything is taken down: a save under way ends, in whatever way.

    A save is bounded by its deadlines, so this is, too. It runs when the main thread has ended, whether by an
    exception, `sys.exit` or Ctrl-C; `atexit` would be too late: `concurrent.futures` is closed by then, and with it
    what file systems resolve names by.
    """
    _ENDING.set()
    for worker in list(_LIVING):
        worker.join()


# A forked child (of a data loader, say) has none of the threads: what they were to do is not the child's to do.
os.register_at_fork(after_in_child=_LIVING.clear)
_register = getattr(threading, "_register_atexit", atexit.register)  # as `concurrent.futures` does, Python >= 3.9
_register(_let_end)
