"""MLflow: metrics over steps, and tags of the run that say where its newest checkpoint is and what went wrong last."""

from __future__ import annotations

from typing import Any

from shardckpt.engine.events.facts import name_of, numbers_of, problem_of
from shardckpt.engine.events.kinds import Committed, Event
from shardckpt.integrations.frameworks import need


class MLflow:
    """Subscribe it on the rank that has the run, rank 0: `checkpoints.subscribe(MLflow(run))`.

    It tells the run by its id: MLflow's active run is one of a thread, and subscribers are called in another.

    Args:
        run: what `mlflow.start_run` or `mlflow.active_run` gave; it stays the program's.
        prefix: before the names of metrics ("checkpoint/total_s") and tags ("checkpoint.url").
    """

    def __init__(self, run: Any, *, prefix: str = "checkpoint") -> None:
        self._entities = need("mlflow.entities", extra="mlflow")
        self._client = need("mlflow", extra="mlflow").MlflowClient()
        self._id, self._prefix = run.info.run_id, prefix

    def __call__(self, event: Event) -> None:
        if event.rank != 0:
            return
        at = int(event.at * 1000)
        numbers = numbers_of(event).items()
        metrics = [self._entities.Metric(f"{self._prefix}/{name}", value, at, event.step) for name, value in numbers]
        tags = {}
        if isinstance(event, Committed):
            tags = {"url": event.url, "step": str(event.step)}
        if problem_of(event):
            tags = {"problem": f"step {event.step} {name_of(event)}: {problem_of(event)}"[:5000]}
        if metrics or tags:
            named = [self._entities.RunTag(f"{self._prefix}.{name}", value) for name, value in tags.items()]
            self._client.log_batch(self._id, metrics=metrics, tags=named)
