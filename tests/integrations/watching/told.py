"""Runs `launch/watching.py` as a person would, and says what each tool then has, read by its own reader."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[3] / "launch" / "watching.py"


def run(rank: int, world_size: int, folder: Path, root: Path) -> dict[str, Any]:
    """In a process that ends afterwards: W&B and MLflow leave threads, processes and connections behind."""
    os.environ.update(WANDB_SILENT="true")
    spans, points = _listen_to_telemetry()
    sys.argv = [str(PROGRAM), str(root)]
    runpy.run_path(str(PROGRAM), run_name="__main__")
    sys.modules["wandb"].teardown()
    return {
        "tensorboard": _tensorboard(root / "tensorboard"),
        "wandb": _wandb(root / "wandb"),
        "mlflow": _mlflow(),
        "prometheus": _prometheus(root / "shardckpt.prom"),
        "spans": spans(),
        "points": points(),
        "lines": [json.loads(line) for line in (root / "run" / "saves.jsonl").read_text().splitlines()],
        "uploaded": sorted(os.listdir(root / "uploaded")),
    }


def _listen_to_telemetry() -> tuple[Any, Any]:
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, reader, tracers = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(MeterProvider([reader]))

    def spans() -> list[dict[str, Any]]:
        return [json.loads(span.to_json()) for span in exporter.get_finished_spans()]

    def points() -> dict[str, Any]:
        found = json.loads(reader.get_metrics_data().to_json())
        named = found["resource_metrics"][0]["scope_metrics"][0]["metrics"]
        return {metric["name"]: metric["data"]["data_points"] for metric in named}

    return spans, points


def _tensorboard(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    scalars = {tag: [[at.step, at.value] for at in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag: [[at.step, at.tensor_proto.string_val[0].decode()] for at in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return {"scalars": scalars, "texts": texts}


def _wandb(folder: Path) -> dict[str, Any]:
    """W&B has no reader in Python any more; its records are protobuf messages, in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("offline-run-*/run-*.wandb")
    found: dict[str, Any] = {"rows": [], "alerts": [], "axes": {}, "summary": {}}
    for content in _leveldb(file.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found["rows"].append(_items(record.history.item))
        elif kind == "alert":
            found["alerts"].append([record.alert.title, record.alert.text, record.alert.level])
        elif kind == "metric" and record.metric.glob_name:
            found["axes"][record.metric.glob_name] = record.metric.step_metric
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _leveldb(content: bytes) -> Iterator[bytes]:
    """Records, of which each may lie in several pieces: CRC (4), length (2), kind (1: whole, 2: first, 4: last)."""
    at, record, block = 7, b"", 1 << 15
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record, at = record + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def _mlflow() -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs(["0"])
    names = [name for name in run.data.metrics if name.startswith("checkpoint/")]
    history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    metrics = {name: [[point.step, point.value] for point in points] for name, points in history.items()}
    return {"metrics": metrics, "tags": dict(run.data.tags), "status": run.info.status}


def _prometheus(file: Path) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(file.read_text()) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}
