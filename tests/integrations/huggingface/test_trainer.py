"""`Trainer`: its options keep their meaning; a training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs, options
from tests.integrations.huggingface.jobs import Place, Seen
from tests.integrations.huggingface.places import place_in
from tests.scorecard import Scale
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.xdist_group("huggingface")


Life = Callable[[int], Seen]


@pytest.fixture(scope="module")
def in_one_life(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """By the number of processes: what is seen when nothing comes between."""

    @cache
    def seen(world_size: int) -> Seen:
        folder = tmp_path_factory.mktemp("whole")
        place = Place(str(folder), folder)
        first: Seen = forks.run(world_size, jobs.train, place, {"save_strategy": "no"}, preload=jobs.PRELOAD)[0]
        return first

    return seen


PLACES = [(1, "file"), (2, "s3"), (1, "s3"), (2, "file")]
"""Processes, and where; the first two are a sample."""


@pytest.mark.timeout(600)
def test_a_killed_training_goes_on_with_the_same_losses(
    forks: Forks, in_one_life: Life, tmp_path: Path, moto: S3Server, scale: Scale
) -> None:
    for number, (world_size, kind) in enumerate(PLACES[: scale.runs(sample=2, full=4)]):
        expected = in_one_life(world_size)
        place = place_in(kind, tmp_path / f"killed-{number}", moto)
        killed = forks.run_settled(world_size, jobs.killed, place, {}, 4)
        assert {one.killed for one in killed} == {signal.SIGKILL}
        seen = forks.run(world_size, jobs.resumed, place, {})
        assert [one.resumed for one in seen] in ([2] * world_size, [4] * world_size)
        assert seen[0].losses == expected.losses
        assert len(expected.losses) == 8
        assert seen[0].steps == [2, 4, 6, 8]


def test_a_training_that_is_told_to_stop_saves_and_goes_on(forks: Forks, in_one_life: Life, tmp_path: Path) -> None:
    """The signal goes to one of two ranks, between two saves."""
    place = Place(str(tmp_path), tmp_path)
    stopped = forks.run(2, jobs.stopped, place, {"save_steps": 100}, 3)
    (last,) = stopped[0].steps
    assert 3 <= last < 8
    seen = forks.run(2, jobs.resumed, place, {"save_steps": 100})
    assert [one.resumed for one in seen] == [last, last]
    assert seen[0].losses == in_one_life(2).losses


def test_each_option_means_what_it_means_there(forks: Forks, tmp_path: Path, scale: Scale) -> None:
    """Which steps stay, which is the best and loaded at the end, what `from_pretrained` finds: as Trainer's own."""
    cases = list(options.CASES)[: scale.runs(sample=3, full=8)]
    (found,) = forks.run(1, options.compare, tmp_path, cases, preload=jobs.PRELOAD)
    assert found == {name: [] for name in cases}


def test_every_way_to_resume(forks: Forks, tmp_path: Path) -> None:
    (found,) = forks.run(1, options.resume_in_every_way, tmp_path, preload=jobs.PRELOAD)
    assert "No valid checkpoint found in output directory" in found.pop("nothing there")
    assert found == {
        "by the name of the copy": (4, True),
        "a step of another run": (6, True),
        "what Trainer wrote": (None, True),
        "auto, nothing there": (None, True),
        "past a damaged step": (6, True),
        "from_pretrained of a step": True,
        "copies that a killed job left undone": True,
        "what Trainer wrote stays": True,
    }


def test_what_it_cannot_do_it_refuses(forks: Forks, tmp_path: Path) -> None:
    (told,) = forks.run(1, options.refused, tmp_path, preload=jobs.PRELOAD)
    assert told == [
        "a Trainer saves and loads checkpoints while train() runs; save_model() needs none",
        "deepspeed keeps its state itself: use transformers.Trainer with it",
        "hub_strategy='every_save': checkpoints are not pushed; push_to_hub() after train() pushes the model",
        "transformers 5.0 is too old: its Trainer has no _finalize_training, which came with 5.3",
    ]
