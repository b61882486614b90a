"""What the ranks do in the gang contract: functions by name, which can be sent to other processes.

Ranks that must wait for each other outside of the gang do it by files in a folder, as threads and processes both can.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from shardckpt.errors import GangError
from shardckpt.gang.base import Gang, GatherError
from shardckpt.gang.together import together, together_gather

LONG = timedelta(seconds=30)
"""For what succeeds."""
SHORT = timedelta(seconds=0.5)
"""For what fails, because somebody does not come."""
ENOUGH_S = 10.0
"""Far less than `LONG` and far more than what is done at once takes: a rank that took longer has waited in vain."""

MESSAGES: list[Any] = [
    None,
    True,
    -(2**80),
    0.1 + 0.2,
    "Zürich ⟂ \0 \\",
    [[], {}, ""],
    {"files": [{"name": "rank_0.pt", "nbytes": 2**40}]},
    "x" * 300_000,
]
"""Of every JSON type, and one that is longer than any frame or packet."""


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which would end the test run if it got away."""


def refusal(act: Callable[[], Any]) -> dict[str, Any]:
    """The error that `act` raises, in a form that a test can compare; empty if it raises none."""
    began = time.monotonic()
    try:
        act()
    except (GangError, Interrupted) as error:
        failures = getattr(error, "failures", {})
        return {
            "kind": type(error).__name__,
            "text": str(error),
            "absent": getattr(error, "absent", ()),
            "failures": {rank: [failure.kind, failure.message] for rank, failure in failures.items()},
            "step": getattr(error, "step", None),
            "cause": None if error.__cause__ is None else type(error.__cause__).__name__,
            "took_s": time.monotonic() - began,
        }
    return {}


def go_on(gang: Gang) -> Any:
    """The next conversation, which must work after every failure."""
    gang.enter("next", timeout=LONG)
    values = gang.gather(["next", gang.rank], timeout=LONG)
    assert values is None or values == [["next", rank] for rank in range(gang.size)]
    return gang.broadcast(["next", gang.size], timeout=LONG)


def mark(place: Path, name: str, rank: int) -> None:
    (place / f"{name}_{rank}").touch()


def await_marks(place: Path, name: str, count: int) -> None:
    """Wait until so many ranks have set that mark."""
    end = time.monotonic() + LONG.total_seconds()
    while len(list(place.glob(f"{name}_*"))) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"{count} ranks should have set the mark {name!r}")
        threading.Event().wait(0.005)


def show(gang: Gang) -> Any:
    return [gang.rank, gang.size, gang.name]


def gather_messages(gang: Gang) -> Any:
    gang.enter("gather", timeout=LONG)
    return [gang.gather([gang.rank, message], timeout=LONG) for message in MESSAGES]


def broadcast_messages(gang: Gang) -> Any:
    gang.enter("broadcast", timeout=LONG)
    return [gang.broadcast(["from", gang.rank, message], timeout=LONG) for message in MESSAGES]


def send_bytes(gang: Gang) -> Any:
    gang.enter("bytes", timeout=LONG)
    raw: Any = b"raw"
    refused = ""
    try:
        gang.gather(raw, timeout=LONG)
    except TypeError as error:
        refused = type(error).__name__
    return refused, gang.broadcast((1, (2,)), timeout=LONG)


def act_outside(gang: Gang) -> Any:
    refusals = [refusal(lambda: gang.gather(1, timeout=LONG)), refusal(lambda: gang.broadcast(1, timeout=LONG))]
    gang.enter("inside", timeout=LONG)
    gang.close()
    return [*refusals, refusal(lambda: gang.gather(1, timeout=LONG))]


def enter_many(gang: Gang) -> Any:
    told = []
    for k in range(5):
        gang.enter("again and again" if k % 2 else f"scope {k}", timeout=LONG)
        for i in range(3):
            gang.gather(gang.rank, timeout=LONG)
            told.append(gang.broadcast(f"{k} {i}", timeout=LONG))
    return told


def work_well(gang: Gang) -> Any:
    gang.enter("work", timeout=LONG)
    own = together(gang, lambda: {gang.rank}, phase="plan", timeout=LONG)  # a set: it need not be JSON
    return own, together_gather(gang, lambda: gang.rank**2, phase="write", timeout=LONG)


def raise_disk_full() -> None:
    raise OSError("disk full")


def fail_on_last(gang: Gang) -> Any:
    gang.enter("fail", timeout=LONG)

    def work() -> None:
        if gang.rank == gang.size - 1:
            raise_disk_full()

    return refusal(lambda: together(gang, work, phase="write", timeout=LONG, step=7)), go_on(gang)


def gather_bytes(gang: Gang) -> Any:
    gang.enter("bytes", timeout=LONG)
    value: Any = b"raw" if gang.rank == 0 else 1
    return refusal(lambda: together_gather(gang, lambda: value, phase="write", timeout=LONG)), go_on(gang)


def interrupt_last(gang: Gang) -> Any:
    gang.enter("interrupt", timeout=LONG)

    def work() -> None:
        if gang.rank == gang.size - 1:
            raise Interrupted("ctrl-c")

    return refusal(lambda: together(gang, work, phase="write", timeout=LONG)), go_on(gang)


def use_subgangs(gang: Gang) -> Any:
    everyone = list(range(gang.size))
    alone = _ranks_of(gang.subgang([gang.rank], "part"))
    return alone, _ranks_of(gang.subgang(everyone, "part")), _ranks_of(gang.subgang(everyone[::-1], "part"))


def use_halves(gang: Gang) -> Any:
    half = [0, 1] if gang.rank < 2 else [2, 3]
    outside = gang.subgang([3, 1], "odd")
    assert (outside is None) == (gang.rank % 2 == 0)
    return _ranks_of(gang.subgang(half, "half"))


def _ranks_of(gang: Gang | None) -> Any:
    """This rank's number in the gang, and how many have answered there."""
    assert gang is not None
    gang.enter("part", timeout=LONG)
    ranks = gang.gather(gang.rank, timeout=LONG)
    told = gang.broadcast(ranks, timeout=LONG)
    assert told == list(range(gang.size))
    gang.close()
    return [gang.rank, gang.size]


def close_twice(gang: Gang) -> Any:
    gang.enter("close", timeout=LONG)
    gang.broadcast(1, timeout=LONG)
    gang.close()
    gang.close()
    return refusal(lambda: gang.broadcast(1, timeout=LONG))


def count_arrivals(gang: Gang, place: Path) -> Any:
    mark(place, "arrived", gang.rank)
    gang.enter("barrier", timeout=LONG)
    return len(list(place.glob("arrived_*")))


def stay_away(gang: Gang, absent: int, place: Path) -> Any:
    gang.enter("before", timeout=LONG)
    error: Any = None
    if gang.rank == absent:
        await_marks(place, "left", gang.size - 1)
    else:
        error = refusal(lambda: gang.enter("first", timeout=SHORT))
        mark(place, "left", gang.rank)
    return error, go_on(gang)


def come_late(gang: Gang, late: int, place: Path) -> Any:
    gang.enter("before", timeout=LONG)
    if gang.rank == late:
        await_marks(place, "left", gang.size - 1)
    error = refusal(lambda: gang.enter("first", timeout=LONG if gang.rank == late else SHORT))
    mark(place, "left", gang.rank)
    return error, go_on(gang)


def enter_elsewhere(gang: Gang, stray: int) -> Any:
    gang.enter("before", timeout=LONG)
    error = refusal(lambda: gang.enter("load/1" if gang.rank == stray else "save/1", timeout=LONG))
    return error, go_on(gang)


def run_ahead(gang: Gang, ahead: int, skipped: Sequence[str] = ()) -> Any:
    gang.enter("before", timeout=LONG)
    first, told = (2, skipped) if gang.rank == ahead else (1, ())
    for number in range(first, 9):
        if not refusal(lambda: gang.enter(f"scope {number}", timeout=LONG, skipped=told)):  # noqa: B023 (called at once)
            return f"scope {number}"
    return "never"


def miss_a_gather(gang: Gang, missing: int, place: Path) -> Any:
    gang.enter("gather", timeout=LONG)
    found: Any = None
    if gang.rank == missing:
        await_marks(place, "over", gang.size - 1)
    try:
        gang.gather(f"value {gang.rank}", timeout=SHORT)
    except GatherError as error:
        found = error.absent, error.values
    told = gang.broadcast("it is over", timeout=LONG)
    mark(place, "over", gang.rank)
    return found or told, go_on(gang)


def fail_and_hang(gang: Gang, place: Path) -> Any:
    gang.enter("fail", timeout=LONG)

    def work() -> None:
        if gang.rank in (1, 3):
            raise ValueError("x" * 20)
        if gang.rank == 2:
            await_marks(place, "over", 3)

    error = refusal(lambda: together(gang, work, phase="write", timeout=SHORT))
    mark(place, "over", gang.rank)
    return error, go_on(gang)


def overrun(gang: Gang, place: Path) -> Any:
    gang.enter("slow", timeout=LONG)

    def work() -> None:
        if gang.rank == 0:
            await_marks(place, "over", 3)

    error = refusal(lambda: together(gang, work, phase="write", timeout=SHORT))
    mark(place, "over", gang.rank)
    return error, go_on(gang)
