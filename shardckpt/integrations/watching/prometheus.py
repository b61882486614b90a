"""Prometheus: counters, histograms and gauges of a process, for its own endpoint, or a file for the node exporter."""

from __future__ import annotations

import os
from typing import Any

from shardckpt.engine.events.facts import SECONDS, costs_of, name_of
from shardckpt.engine.events.kinds import Committed, Deleted, Event, Loaded, Measured, SaveOver, SubscriberFailed
from shardckpt.integrations.frameworks import need

_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Prometheus:
    """Subscribe it on every rank that is scraped, or on rank 0 only: `checkpoints.subscribe(Prometheus())`.

    One for a process: metrics of one name can be in a registry once, and several managers may share it.

    - `shardckpt_saves_total{outcome}`: "committed", "failed", "skipped", "unknown"
    - `shardckpt_save_seconds{part}`: histograms, of committed saves; stall, overlap, stage, write, commit, total
    - `shardckpt_last_step`, `shardckpt_last_commit_timestamp_seconds`, `shardckpt_checkpoint_bytes`: of the last commit
    - `shardckpt_retries_total`: requests to the storage that were tried again, while saving
    - `shardckpt_loads_total`, `shardckpt_load_seconds_total`, `shardckpt_deleted_total`: of steps; the last by rank 0
    - `shardckpt_metric{name}`: the last score and metrics; by rank 0
    - `shardckpt_subscriber_failures_total`: subscribers and callbacks that raised or did not return

    An alert: `time() - shardckpt_last_commit_timestamp_seconds > 3600`.

    Args:
        registry: a `CollectorRegistry`; that of the process (`REGISTRY`), if neither it nor a file is given.
        textfile: a file ending in `.prom`, in the folder of the node exporter's textfile collector, that is replaced at
            each change: for jobs that nobody scrapes. With a rank of its own in its name, if several ranks write one.
    """

    def __init__(self, registry: Any = None, *, textfile: str | os.PathLike[str] | None = None) -> None:
        self._client = client = need("prometheus_client", extra="prometheus")
        if registry is None:  # into a file go these metrics alone: the node exporter has its own of the process
            registry = client.REGISTRY if textfile is None else client.CollectorRegistry()
        self._registry = registry
        self._textfile = None if textfile is None else os.fspath(textfile)
        at: dict[str, Any] = {"namespace": "shardckpt", "registry": self._registry}
        self._saves = client.Counter("saves", "Saves that are over", ["outcome"], **at)
        self._seconds = client.Histogram("save_seconds", "What saves cost", ["part"], buckets=_BUCKETS, **at)
        self._step = client.Gauge("last_step", "The step that was committed last", **at)
        self._time = client.Gauge("last_commit_timestamp_seconds", "When that was", **at)
        self._nbytes = client.Gauge("checkpoint_bytes", "Bytes of that checkpoint", **at)
        self._retries = client.Counter("retries", "Requests to the storage that were tried again", **at)
        self._loads = client.Counter("loads", "Steps that were loaded", **at)
        self._load_seconds = client.Counter("load_seconds", "How long loading took", **at)
        self._deleted = client.Counter("deleted", "Steps that were deleted", **at)
        self._metric = client.Gauge("metric", "The last score and metrics", ["name"], **at)
        self._failures = client.Counter("subscriber_failures", "Subscribers that failed", **at)
        for outcome in ("committed", "failed", "skipped", "unknown"):
            self._saves.labels(outcome)  # 0 from the start, so that the first failure is an increase

    def __call__(self, event: Event) -> None:
        if isinstance(event, SaveOver):
            self._saved(event)
        elif isinstance(event, Loaded):
            self._loads.inc()
            self._load_seconds.inc(event.seconds)
        elif isinstance(event, Deleted):
            self._deleted.inc()
        elif isinstance(event, Measured):
            for name, value in event.metrics.items():
                self._metric.labels(name).set(value)
        elif isinstance(event, SubscriberFailed):
            self._failures.inc()
        else:
            return
        if self._textfile is not None:
            self._client.write_to_textfile(self._textfile, self._registry)

    def _saved(self, event: SaveOver) -> None:
        costs = costs_of(event.report)
        self._saves.labels(name_of(event)).inc()
        self._retries.inc(costs["retries"])
        if isinstance(event, Committed):
            for name in SECONDS:
                self._seconds.labels(name.removesuffix("_s")).observe(costs[name])
            self._step.set(event.step)
            self._time.set(event.at)
            self._nbytes.set(costs["nbytes"])
