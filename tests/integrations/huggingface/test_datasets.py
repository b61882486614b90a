"""Streams of `datasets`: each rank goes on at its place."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs, streams
from tests.integrations.huggingface.jobs import Place
from tests.integrations.huggingface.places import place_in
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.xdist_group("huggingface")


@pytest.mark.parametrize(("world_size", "kind", "kill_at"), [(1, "s3", 12), (2, "file", 6)])
def test_a_killed_training_goes_on_at_its_place_in_the_stream(
    forks: Forks, tmp_path: Path, moto: S3Server, world_size: int, kind: str, kill_at: int
) -> None:
    """Killed in the second epoch."""
    whole = Place(str(tmp_path / "whole"), tmp_path / "whole")
    expected = forks.run(world_size, streams.train, whole, None, False, preload=jobs.PRELOAD)
    place = place_in(kind, tmp_path, moto)
    killed = forks.run_settled(world_size, streams.train, place, kill_at, False)
    assert {one.killed for one in killed} == {signal.SIGKILL}
    seen = forks.run(world_size, streams.train, place, None, True)
    assert {one.resumed for one in seen} <= {kill_at - 2, kill_at}
    assert [one.losses for one in seen] == [one.losses for one in expected]
    assert all(len(one.losses) == 3 * streams.LINES // streams.BATCH // world_size for one in expected)
    assert world_size == 1 or expected[0].losses != expected[1].losses
