"""The harness finds what it is for: each fault that is put into the engine is noticed, but for those that are none."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.testing.crash.requests import left
from shardckpt.testing.crash.states import LYING, states
from tests.crash import requested
from tests.crash.acts import ACTS, record
from tests.crash.mutations import MUTATIONS, OBJECT_MUTATIONS
from tests.crash.ours import reader_of
from tests.crash.tries import try_states
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1200)]

ROW = "durability mutations"


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.sampled(3)
def test_a_fault_is_noticed(tmp_path: Path, name: str, scale: Scale, scorecard: Scorecard) -> None:
    fault = MUTATIONS[name]
    act = ACTS[fault.act]
    recording = record(act, fault.ranks, tmp_path, leave_out=fault.syncs, spoilt=fault.context)
    wanted = scale.runs(sample=100, full=2000) if fault.equivalent else 2000
    found = states(recording, fault.model, count=wanted, seed=1)
    told = (sc.CheckpointDamagedError,) if fault.model is LYING else ()
    reader = reader_of(fault.ranks, width=act.width, sums=fault.model is not LYING)
    with fault.context() if fault.looking else nullcontext():
        tried = try_states(found, reader, recoveries=wanted, width=act.width, told=told, stop=True)
    scorecard.add(ROW, runs=1, notes=f"equivalent: {name}" if fault.equivalent else "")
    assert bool(tried.findings) != bool(fault.equivalent), f"{tried.states} states: {tried.first or fault.equivalent}"


@pytest.mark.parametrize("name", OBJECT_MUTATIONS)
def test_a_fault_on_object_stores_is_noticed(name: str, scorecard: Scorecard) -> None:
    fault = OBJECT_MUTATIONS[name]
    place = requested.record(fault.act, fault.ranks, spoilt=fault.context)
    lefts = left(place.events, count=400, seed=1, before=requested.BEFORE)
    tried = requested.try_left(lefts, reader_of(fault.ranks), width=600, recoveries=400, stop=True)
    scorecard.add(ROW, runs=1)
    assert tried.findings, tried.states
