"""Whenever the power fails, the catalog offers whole checkpoints only, and none that was acknowledged is lost."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.crash.judge import in_memory, judge, on_disk
from shardckpt.testing.crash.operations import Allowed
from shardckpt.testing.crash.states import LYING, MINIMAL, ORDERED, Model, states
from tests.crash.acts import ACTS, CASES, ROOT, record
from tests.crash.ours import OurReader, reader_of, rebuilt, recover
from tests.crash.tries import try_states
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600)]

ROW, ROW_OF_REPAIRS = "crash states", "crash states, repaired"
LONGEST = 6000
"""States of a case and model in a full run, at most: small jobs have fewer (some 500)."""


@pytest.mark.parametrize("model", [ORDERED, MINIMAL], ids=lambda model: model.name)
@pytest.mark.parametrize(("name", "ranks"), CASES)
@pytest.mark.sampled(2)
def test_after_a_power_cut(
    tmp_path: Path, name: str, ranks: int, model: Model, scale: Scale, scorecard: Scorecard
) -> None:
    act = ACTS[name]
    recording = record(act, ranks, tmp_path)
    wanted = scale.runs(sample=87, full=LONGEST)
    recoveries = scale.runs(sample=8, full=LONGEST)
    found = states(recording, model, count=wanted, seed=1)
    tried = try_states(found, reader_of(ranks, width=act.width), recoveries=recoveries, width=act.width)
    notes = f"{model.name}; {name.partition(',')[0]}"
    findings = tried.findings
    lost = findings["lost"] + findings["back"]
    scorecard.add(ROW, runs=tried.states, torn=findings["torn"], lost=lost, outside=findings["outside"], notes=notes)
    scorecard.add("crash states from which a job went on", runs=tried.recovered)
    assert not findings, tried.first
    assert tried.states > 50


@pytest.mark.parametrize("name", ["save", "same step again", "delete, keep model", "export", "repair"])
def test_a_repair_after_a_power_cut(tmp_path: Path, name: str, scale: Scale, scorecard: Scorecard) -> None:
    """Whatever was left, what repair puts in force by itself is whole, and of a version that had been begun. A repair
    that was cut off comes to its end when it is done again."""
    recording, reader = record(ACTS[name], 2, tmp_path), reader_of(2)
    made, again = 0, 0
    for state in states(recording, MINIMAL, count=scale.runs(sample=150, full=LONGEST), seed=4):
        storage = in_memory(state.files, state.folders, below=ROOT)
        before = Catalog(storage).steps()
        for step in {number for number in state.allowed if number not in before}:
            with suppress(sc.CheckpointError):  # it cannot be proven that all is there, or there is nothing
                made += sc.repair(storage, step=step, apply=True).applied
        findings = [finding for finding in judge(storage, begun(state.allowed), reader) if finding.kind != "back"]
        scorecard.add(ROW_OF_REPAIRS, runs=1, torn=len(findings), notes=name)
        assert findings == [], f"after {state.prefix} operations: {findings}; there: {sorted(state.files)}"
        if rebuilt(2) in state.allowed.get(2, ()):
            again += 1
            assert reader.version(storage, 2) in (2, rebuilt(2))
    assert bool(again) == (name == "repair")
    assert made


def begun(allowed: Allowed) -> Allowed:
    """Versions that may be found once a repair has rebuilt the records of some."""
    return {
        step: frozenset([*versions, *(rebuilt(version) for version in versions if isinstance(version, int))])
        for step, versions in allowed.items()
    }


def test_a_device_that_lies_is_told_of(tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    """Data that had been synced is gone: nothing can be done, but a load never gives other values than were saved."""
    for name in ("save", "same step again", "export"):
        (tmp_path / name).mkdir()
        recording = record(ACTS[name], 2, tmp_path / name)
        reader = reader_of(2, sums=False)
        found = states(recording, LYING, count=scale.runs(sample=200, full=1000), seed=1)
        tried = try_states(found, reader, recoveries=0, told=(sc.CheckpointDamagedError,))
        scorecard.add("crash states, a device that lies", runs=tried.states, torn=tried.findings["torn"])
        assert not tried.findings, tried.first


def test_the_same_on_real_files(tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    """States are judged in memory; that this makes no difference is seen on some, as files."""
    (tmp_path / "watched").mkdir()
    recording = record(ACTS["same step again, no exchange"], 1, tmp_path / "watched")
    for number, state in enumerate(states(recording, MINIMAL, count=scale.runs(sample=20, full=1000), seed=2)):
        place = tmp_path / str(number)
        place.mkdir()
        on_disk(state.files, state.folders, root=place)
        storage, reader = LocalStorage(place / ROOT), OurReader(1)
        assert judge(storage, state.allowed, reader) == []
        assert recover(storage, state.allowed, reader_of(1)) == []
        scorecard.add("crash states, on real files", runs=1)


def test_the_same_states_for_the_same_seed(tmp_path: Path) -> None:
    recording = record(ACTS["save"], 2, tmp_path)
    first, second = ([s.files for s in states(recording, MINIMAL, count=80, seed=3)] for _ in range(2))
    assert first == second
    assert len({frozenset(files.items()) for files in first}) > 40
