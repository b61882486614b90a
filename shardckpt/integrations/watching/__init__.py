"""Checkpoints on people's dashboards: subscribers that tell TensorBoard, Weights & Biases, MLflow, Prometheus and
OpenTelemetry of saves, loads, deletions and scores. For plain JSON lines there is `shardckpt.SaveLog`.

Each is given what the program has made of that tool (a writer, a run, a registry), and makes, configures and ends none:

    checkpoints.subscribe(TensorBoard(writer))

Numbers have the names of `SaveReport`: `stall_s`, `overlap_s`, `stage_s`, `write_s`, `commit_s`, `total_s` in seconds,
`nbytes`, `rate` in bytes a second, `slowest_s` (the rank whose writing took longest), `retries`; of loads `load_s` and
`load_nbytes`; and `score` and metrics, by their names.
"""

from shardckpt.integrations.watching.mlflow import MLflow as MLflow
from shardckpt.integrations.watching.opentelemetry import OpenTelemetry as OpenTelemetry
from shardckpt.integrations.watching.prometheus import Prometheus as Prometheus
from shardckpt.integrations.watching.tensorboard import TensorBoard as TensorBoard
from shardckpt.integrations.watching.wandb import WandB as WandB

__all__ = ["MLflow", "OpenTelemetry", "Prometheus", "TensorBoard", "WandB"]
