"""Changes of the state that a load which was given up no longer makes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shardckpt.errors import CheckpointLoadError

_LAST_COPY_S = 5.0


class Gate:
    """Lets copies through, a few at once, until it is closed."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._permits = threading.Semaphore(at_once)
        self._closed = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        with self._permits:
            if self._closed:
                raise TimeoutError("the load was given up")
            yield

    def close(self) -> None:
        """From now on nothing is copied; returns when what is being copied has been."""
        self._closed = True
        taken = sum(self._permits.acquire(timeout=_LAST_COPY_S) for _ in range(self._at_once))
        self._permits.release(max(taken, 1))  # those that come late are to find it closed, and to end


@contextmanager
def unfinished(gate: Gate, what: str) -> Iterator[None]:
    """Around changes of the state: if they break off, nothing comes late, and the error says what the state is."""
    try:
        yield
    except (OSError, EOFError) as error:
        gate.close()
        raise CheckpointLoadError(
            f"{what}: {error}; by now some tensors of the state are "
            "loaded and some are not, so do not go on with it: load again, or start the program again"
        ) from error
