"""What events say in names and numbers: the same words in every log and on every dashboard."""

from __future__ import annotations

from shardckpt.engine.events.kinds import (
    Committed,
    Deleted,
    Event,
    Loaded,
    Measured,
    SaveFailed,
    SaveSkipped,
    StopAgreed,
    SubscriberFailed,
)
from shardckpt.engine.progress import SaveReport
from shardckpt.errors import CommitUnknownError

SECONDS = ("stall_s", "overlap_s", "stage_s", "write_s", "commit_s", "total_s")
"""What a save cost, in seconds: see `SaveReport`."""


def name_of(event: Event) -> str:
    """What has happened, in a word or two; empty for what only concerns the inside of a save.

    A save has ended as "committed", "failed", "skipped", or "unknown" where nobody knows whether it was committed.
    """
    if isinstance(event, SaveFailed) and event.kind == CommitUnknownError.__name__:
        return "unknown"
    return _NAMES.get(type(event), "")


_NAMES: dict[type[Event], str] = {
    Committed: "committed",
    SaveFailed: "failed",
    SaveSkipped: "skipped",
    Deleted: "deleted",
    Loaded: "loaded",
    Measured: "measured",
    StopAgreed: "stop agreed",
    SubscriberFailed: "subscriber failed",
}


def costs_of(report: SaveReport) -> dict[str, float]:
    """`nbytes` of the whole checkpoint, the seconds, `rate` in bytes a second, `slowest_s`, `retries`."""
    costs: dict[str, float] = {"nbytes": report.total_nbytes}
    costs |= {name: round(getattr(report, name), 6) for name in (*SECONDS, "rate", "slowest_s")}
    return costs | {"retries": report.retries}


def problem_of(event: Event) -> str:
    """Why a save has failed or was skipped, or how a subscriber has; empty where nothing is wrong."""
    if isinstance(event, SaveSkipped):
        return event.reason
    if isinstance(event, SubscriberFailed):
        return f"{event.subscriber}: {event.kind}: {event.error}"
    return event.error if isinstance(event, SaveFailed) else ""


def numbers_of(event: Event) -> dict[str, float]:
    """What can be drawn over steps: of a committed save its costs, of a load `load_s`, the metrics of a step."""
    if isinstance(event, Committed):
        return costs_of(event.report)
    if isinstance(event, Loaded):
        return {"load_s": event.seconds, "load_nbytes": event.nbytes}
    return dict(event.metrics) if isinstance(event, Measured) else {}
