"""`launch/watching.py`, and what each tool then has, read by its own reader; failures; tools that are not installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import shardckpt as sc
from shardckpt.engine.progress import Phase, SaveReport
from shardckpt.integrations.frameworks import FrameworkMissingError
from shardckpt.integrations.watching import MLflow, OpenTelemetry, Prometheus, TensorBoard, WandB
from tests.integrations.forks import Forks
from tests.integrations.watching import told as told_of

STEPS = [10, 20, 30, 40]
COSTS = {"nbytes", "stall_s", "overlap_s", "stage_s", "write_s", "commit_s", "total_s", "rate", "slowest_s", "retries"}


@pytest.fixture(scope="module")
def told(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of step 30, the upload fails: something is there already."""
    root = tmp_path_factory.mktemp("watched")
    (root / "uploaded" / "step_30").mkdir(parents=True)
    (found,) = forks.run(1, told_of.run, root, preload=["tests.integrations.compiled"])
    return {**found, "root": root}


def by_step(lines: list[dict[str, Any]], event: str) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in lines if line["event"] == event}


@pytest.mark.xdist_group("plain loop")
@pytest.mark.timeout(120)
class TestEachToolHasIt:
    """Costs and scores of four saves over their steps, where the checkpoint is, and that an upload has failed."""

    def test_json_lines_and_the_uploads(self, told: dict[str, Any]) -> None:
        assert list(by_step(told["lines"], "committed")) == STEPS
        assert list(by_step(told["lines"], "deleted")) == [10, 20]
        assert sorted(by_step(told["lines"], "measured")) == STEPS
        assert list(by_step(told["lines"], "subscriber failed")) == [30]
        assert told["uploaded"] == ["step_10", "step_20", "step_30", "step_40"]
        with sc.CheckpointManager(told["root"] / "uploaded") as copies:
            assert copies.steps() == [10, 20, 40]

    def test_tensorboard(self, told: dict[str, Any]) -> None:
        scalars, saved = told["tensorboard"]["scalars"], by_step(told["lines"], "committed")
        assert {tag.removeprefix("checkpoint/") for tag in scalars} == {*COSTS, "loss", "score"}
        for name in COSTS:
            expected = [[step, pytest.approx(saved[step][name], rel=1e-5)] for step in STEPS]
            assert scalars[f"checkpoint/{name}"] == expected
        assert [step for step, _ in scalars["loss"]] == list(range(1, 41))
        ((step, text),) = told["tensorboard"]["texts"]["checkpoint/problems/text_summary"]
        assert (step, text.startswith("**subscriber failed**: __main__.upload: FileExistsError")) == (30, True), text

    def test_wandb(self, told: dict[str, Any]) -> None:
        rows, saved = told["wandb"]["rows"], by_step(told["lines"], "committed")
        assert [row["_step"] for row in rows] == list(range(1, 41)), "no row of the program's is lost or moved"
        assert all("loss" in row for row in rows)
        assert told["wandb"]["axes"] == {"checkpoint/*": "checkpoint/step"}
        found = [row for row in rows if "checkpoint/total_s" in row]
        assert found[-1]["checkpoint/step"] == 40
        assert found[-1]["checkpoint/total_s"] == saved[40]["total_s"]
        assert {row["checkpoint/step"] for row in found} <= set(STEPS)
        assert told["wandb"]["summary"]["checkpoint/url"] == str(told["root"] / "run" / "step_40")
        ((title, text, level),) = told["wandb"]["alerts"]
        assert (title, level) == ("checkpoint: step 30 subscriber failed", "ERROR")
        assert "FileExistsError" in text

    def test_mlflow(self, told: dict[str, Any]) -> None:
        metrics, saved = told["mlflow"]["metrics"], by_step(told["lines"], "committed")
        assert {name.removeprefix("checkpoint/") for name in metrics} == {*COSTS, "score"}
        for name in COSTS:
            assert metrics[f"checkpoint/{name}"] == [[step, pytest.approx(saved[step][name])] for step in STEPS]
        tags = told["mlflow"]["tags"]
        assert tags["checkpoint.url"] == str(told["root"] / "run" / "step_40")
        assert tags["checkpoint.step"] == "40"
        assert tags["checkpoint.problem"].startswith("step 30 subscriber failed: __main__.upload: FileExistsError")
        assert told["mlflow"]["status"] == "FINISHED"

    def test_prometheus(self, told: dict[str, Any]) -> None:
        samples, saved = told["prometheus"], by_step(told["lines"], "committed")
        assert all(name.startswith("shardckpt_") for name in samples)
        outcomes = [samples[f"shardckpt_saves_total {how}"] for how in ("committed", "failed", "skipped", "unknown")]
        assert outcomes == [4, 0, 0, 0]
        assert samples["shardckpt_save_seconds_count write"] == 4
        expected = sum(line["total_s"] for line in saved.values())
        assert samples["shardckpt_save_seconds_sum total"] == pytest.approx(expected)
        assert samples["shardckpt_last_step"] == 40
        assert samples["shardckpt_checkpoint_bytes"] == saved[40]["nbytes"] > 0
        assert samples["shardckpt_last_commit_timestamp_seconds"] == pytest.approx(saved[40]["at"], abs=0.01)
        assert samples["shardckpt_deleted_total"] == 2
        assert samples["shardckpt_subscriber_failures_total"] == 1
        assert samples["shardckpt_metric score"] == by_step(told["lines"], "measured")[40]["metrics"]["score"]

    def test_opentelemetry(self, told: dict[str, Any]) -> None:
        saves = [span for span in told["spans"] if span["name"] == "checkpoint save"]
        assert [(span["attributes"]["step"], span["attributes"]["outcome"]) for span in saves] == [
            (step, "committed") for step in STEPS
        ]
        for save in saves:
            assert save["parent_id"] is None
            below = [span for span in told["spans"] if span["parent_id"] == save["context"]["span_id"]]
            assert {"save", "stage", "write", "commit"} <= {span["name"] for span in below}
            assert all(save["start_time"] <= span["start_time"] <= span["end_time"] for span in below)
        assert [point["value"] for point in told["points"]["shardckpt.saves"]] == [4]
        parts = {point["attributes"]["part"]: point["count"] for point in told["points"]["shardckpt.save.duration"]}
        assert parts == dict.fromkeys(["stall", "overlap", "stage", "write", "commit", "total"], 4)


def ended(kind: type[sc.SaveOver], /, **what: Any) -> Any:
    report = SaveReport(7, began=100.0, phases=[Phase("save", 100.0, 0.25, "main"), Phase("put", 101.0, 2.0, "save")])
    return kind(step=7, rank=what.pop("rank", 0), at=104.0, report=report, **what)


FAILED = {"error": "no room", "kind": "CheckpointSaveError"}
UNKNOWN = {"error": "no answer", "kind": "CommitUnknownError"}


def test_prometheus_counts_what_was_not_committed() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    subscriber = Prometheus(registry)
    for event in (
        ended(sc.SaveFailed, **FAILED),
        ended(sc.SaveFailed, **UNKNOWN),
        ended(sc.SaveSkipped, reason="busy"),
        sc.Loaded(step=7, rank=3, at=1.0, seconds=1.5, nbytes=20),
    ):
        subscriber(event)
    values = [
        registry.get_sample_value("shardckpt_saves_total", {"outcome": how}) for how in ("failed", "unknown", "skipped")
    ]
    assert values == [1, 1, 1]
    assert registry.get_sample_value("shardckpt_load_seconds_total") == 1.5
    assert registry.get_sample_value("shardckpt_last_step") == 0
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Prometheus(registry)


def test_a_span_of_a_save_that_failed_says_so() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    subscriber = OpenTelemetry(tracer_provider=provider)
    subscriber(ended(sc.SaveFailed, rank=2, **UNKNOWN))
    subscriber(ended(sc.SaveSkipped, reason="busy"))
    subscriber(sc.Loaded(step=7, rank=2, at=10.0, seconds=1.5, nbytes=20))
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["save", "put", "checkpoint save"] * 2 + ["checkpoint load"]
    assert (spans[2].attributes["outcome"], spans[2].attributes["rank"]) == ("unknown", 2)
    assert (spans[2].status.is_ok, spans[2].status.description) == (False, "no answer")
    assert [(span.start_time, span.end_time) for span in (spans[1], spans[2], spans[6])] == [
        (101 * 10**9, 103 * 10**9),
        (100 * 10**9, 104 * 10**9),
        (8.5 * 10**9, 10 * 10**9),
    ]
    assert spans[5].status.is_ok, "a save that was skipped is no error"


class Recorder:
    """Has every method, and notes what was called: for what must not be called at all."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **terms: self.calls.append(name)


def test_other_ranks_say_nothing_to_tools_that_are_shared() -> None:
    writer, run = Recorder(), Recorder()
    subscribers = [TensorBoard(writer), WandB(run)]
    run.calls.clear()
    for subscriber in subscribers:
        subscriber(ended(sc.Committed, rank=1))
        subscriber(ended(sc.SaveFailed, rank=1, **FAILED))
    assert writer.calls == run.calls == []


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("mlflow", lambda: MLflow(None)),
        ("prometheus_client", Prometheus),
        ("opentelemetry", OpenTelemetry),
    ],
)
def test_without_its_package_a_tool_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, make: Any
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FrameworkMissingError, match=r"pip install 'shardckpt\[") as caught:
        make()
    assert caught.value.name == package
