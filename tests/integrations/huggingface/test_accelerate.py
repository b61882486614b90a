"""`Accelerator.save_state` and `load_state`: a training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs
from tests.integrations.huggingface.jobs import Place
from tests.integrations.huggingface.places import place_in
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.xdist_group("huggingface")


@pytest.mark.parametrize(("world_size", "kind", "sharded"), [(1, "s3", False), (2, "file", False), (2, "file", True)])
def test_a_killed_training_goes_on_with_the_same_losses(
    forks: Forks, tmp_path: Path, moto: S3Server, world_size: int, kind: str, sharded: bool
) -> None:
    whole = Place(str(tmp_path / "whole"), tmp_path / "whole")
    (expected, *_) = forks.run(world_size, jobs.with_accelerate, whole, None, False, sharded, preload=jobs.PRELOAD)
    place = place_in(kind, tmp_path, moto)
    killed = forks.run_settled(world_size, jobs.with_accelerate, place, 6, False, sharded)
    assert {one.killed for one in killed} == {signal.SIGKILL}
    seen = forks.run(world_size, jobs.with_accelerate, place, None, True, sharded)
    assert [one.resumed for one in seen] in ([4] * world_size, [6] * world_size)
    assert seen[0].losses == expected.losses
    assert len(expected.losses) == 10
    assert seen[0].steps == [2, 4, 6, 8, 10]
