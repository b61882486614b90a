"""OpenTelemetry: a span for each save and load, with its phases below it, and metrics."""

from __future__ import annotations

from typing import Any

from shardckpt.engine.events.facts import SECONDS, costs_of, name_of, problem_of
from shardckpt.engine.events.kinds import Committed, Event, Loaded, SaveOver, SaveSkipped
from shardckpt.integrations.frameworks import need


class OpenTelemetry:
    """Subscribe it on every rank, or on rank 0 only: `checkpoints.subscribe(OpenTelemetry())`.

    Spans `checkpoint save` and `checkpoint load` have `step`, `rank`, `outcome`, `nbytes`, `url`; each phase of this
    rank is a span below, by its name. Metrics: counter `shardckpt.saves` by `outcome`; histograms
    `shardckpt.save.duration` (s) by `part`, `shardckpt.checkpoint.size` (By), `shardckpt.load.duration` (s).

    Args:
        tracer_provider, meter_provider: those that the program has set for the process, if not given.
    """

    def __init__(self, *, tracer_provider: Any = None, meter_provider: Any = None) -> None:
        self._trace = need("opentelemetry.trace", extra="opentelemetry")
        self._tracer = self._trace.get_tracer("shardckpt", tracer_provider=tracer_provider)
        meter = need("opentelemetry.metrics", extra="opentelemetry").get_meter(
            "shardckpt", meter_provider=meter_provider
        )
        self._saves = meter.create_counter("shardckpt.saves", description="Saves that are over")
        self._seconds = meter.create_histogram("shardckpt.save.duration", "s", "What committed saves cost")
        self._nbytes = meter.create_histogram("shardckpt.checkpoint.size", "By", "Of committed saves")
        self._loads = meter.create_histogram("shardckpt.load.duration", "s", "What loads cost")

    def __call__(self, event: Event) -> None:
        if isinstance(event, SaveOver):
            self._saved(event)
        elif isinstance(event, Loaded):
            about = {"step": event.step, "rank": event.rank, "nbytes": event.nbytes}
            span = self._tracer.start_span(
                "checkpoint load", None, attributes=about, start_time=_ns(event.at - event.seconds)
            )
            span.end(_ns(event.at))
            self._loads.record(event.seconds)

    def _saved(self, event: SaveOver) -> None:
        costs, outcome = costs_of(event.report), name_of(event)
        self._saves.add(1, {"outcome": outcome})
        self._draw(event, {"step": event.step, "rank": event.rank, "outcome": outcome, "nbytes": int(costs["nbytes"])})
        if isinstance(event, Committed):
            for name in SECONDS:
                self._seconds.record(costs[name], {"part": name.removesuffix("_s")})
            self._nbytes.record(int(costs["nbytes"]))

    def _draw(self, event: SaveOver, about: dict[str, Any]) -> None:
        """The save, in a trace of its own, and its phases."""
        report = event.report
        if isinstance(event, Committed):
            about["url"] = event.url
        began = min([report.began, *(phase.began for phase in report.phases)])
        empty = self._trace.set_span_in_context(self._trace.INVALID_SPAN)
        span = self._tracer.start_span("checkpoint save", empty, attributes=about, start_time=_ns(began))
        below = self._trace.set_span_in_context(span)
        for phase in report.phases:
            what = {"thread": phase.thread}
            part = self._tracer.start_span(phase.name, below, attributes=what, start_time=_ns(phase.began))
            part.end(_ns(phase.ended))
        if problem_of(event) and not isinstance(event, SaveSkipped):
            span.set_status(self._trace.StatusCode.ERROR, problem_of(event))
        span.end(_ns(event.at))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
