"""Signals that tell a job to go: noted, handed on to whoever handled them before, and put back at the end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)


class SignalWatch:
    """Handles some signals of this process until `close`. Made and closed on the main thread; others cannot, and it
    then watches nothing.

    `note` gets the name of each signal that comes, on the main thread and between any two of its instructions, so it
    must be safe there. Then the handler that was there before is called, if it is the program's own. The default (the
    end of the process) is not, and Python's own KeyboardInterrupt comes only with the second SIGINT.
    """

    def __init__(self, signals: Iterable[int], note: Callable[[str], None]) -> None:
        self._note = note
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}
        self._counts: dict[int, int] = {}
        numbers = [signal.Signals(number) for number in signals]
        if numbers and threading.current_thread() is not threading.main_thread():
            _log.warning("signals are not watched: only the main thread can do that")
            return
        try:
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put the earlier handlers back, except where another has taken our place meanwhile. May be called twice."""
        if threading.current_thread() is not threading.main_thread() or os.getpid() != self._pid:
            return
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if before is None else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._pid:  # in a child made by fork, which is nobody's rank: as if we had never been there
            if callable(before):
                before(number, frame)
            elif before != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._counts[number] = self._counts.get(number, 0) + 1
        self._note(signal.Signals(number).name)
        if callable(before) and (before is not signal.default_int_handler or self._counts[number] > 1):
            before(number, frame)
