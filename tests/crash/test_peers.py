"""What the same harness finds where others save: a comparison, and a proof that it finds what it looks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shardckpt.testing.crash.judge import in_memory, judge
from shardckpt.testing.crash.states import MINIMAL, ORDERED, Model, states
from tests.crash.peers import PEERS, record
from tests.scorecard import Scale, Scorecard

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint"),
]

SOUND = "torch.save, fsync, rename, fsync of the folder"


@pytest.mark.parametrize("model", [ORDERED, MINIMAL], ids=lambda model: model.name)
@pytest.mark.parametrize("name", PEERS)
def test_others(tmp_path: Path, name: str, model: Model, scale: Scale, scorecard: Scorecard) -> None:
    peer, found, tried = PEERS[name], Counter[str](), 0
    recording = record(peer, tmp_path)
    for state in states(recording, model, count=scale.runs(sample=50, full=1000), seed=1):
        tried += 1
        findings = judge(in_memory(state.files, state.folders), state.allowed, peer.reader)
        found.update({finding.kind for finding in findings})
    scorecard.add(f"for comparison: {name} ({model.name})", runs=tried, torn=found["torn"], lost=found["lost"])
    assert (sum(found.values()) > 0) == (name != SOUND), found
