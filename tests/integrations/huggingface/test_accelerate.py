"""`Accelerator.save_state` and `load_state`: a training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs, words
from tests.integrations.huggingface.jobs import Place
from tests.integrations.huggingface.places import place_in
from tests.scorecard import Scale
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.xdist_group("huggingface")


PLACES = [
    (2, "file", True),
    (1, "s3", False),
    (2, "file", False),
    (2, "s3", True),
    (2, "s3", False),
    (1, "file", False),
]
"""Processes, where, and whether by FSDP2; the first two are a sample."""


@pytest.mark.timeout(600)
def test_a_killed_training_goes_on_with_the_same_losses(
    forks: Forks, tmp_path: Path, moto: S3Server, scale: Scale
) -> None:
    for number, (world_size, kind, sharded) in enumerate(PLACES[: scale.runs(sample=2, full=6)]):
        whole = Place(str(tmp_path / f"whole-{number}"), tmp_path / f"whole-{number}")
        (expected, *_) = forks.run(world_size, jobs.with_accelerate, whole, None, False, sharded, preload=jobs.PRELOAD)
        place = place_in(kind, tmp_path / f"killed-{number}", moto)
        killed = forks.run_settled(world_size, jobs.with_accelerate, place, 6, False, sharded)
        assert {one.killed for one in killed} == {signal.SIGKILL}
        seen = forks.run(world_size, jobs.with_accelerate, place, None, True, sharded)
        assert [one.resumed for one in seen] in ([4] * world_size, [6] * world_size)
        assert seen[0].losses == expected.losses
        assert len(expected.losses) == 10
        assert seen[0].steps == [2, 4, 6, 8, 10]


def test_its_words_keep_their_meaning(forks: Forks, tmp_path: Path) -> None:
    """Names of iterations and `total_limit`, hooks of others, several models, folders with and without a number."""
    (found,) = forks.run(1, words.keep_their_meaning, tmp_path, preload=jobs.PRELOAD)
    assert str(tmp_path / "empty") in found.pop("nothing there")
    assert found == {
        "automatic names, the last two": [1, 2],
        "iteration after a load": 3,
        "all is as it was": True,
        "what a hook leaves to us": ["model_1"],
        "the hook's stays, ours is loaded": (True, False),
        "a step by its folder": [7],
        "loaded from another run": True,
        "saved into its own": (None, [1, 2]),
        "which is left as it was": [9],
        "hooks have a folder": [("own/step_1", True), ("own/checkpoint_2", True)],
        "a name that is taken": "step 2",
        "not torch's": "DEEPSPEED keeps its state itself: use accelerate.Accelerator with it",
        "nothing there, auto": None,
        "nowhere": "where to? give a folder, or Accelerator(checkpoints=...), or a project_dir",
    }
