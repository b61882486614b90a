"""LoRA: the base is stored once, an adapter loads alone, and what PEFT reads lies beside each step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs
from tests.integrations.huggingface.jobs import Place
from tests.integrations.huggingface.places import place_in
from tests.scorecard import Scale
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.xdist_group("huggingface")


PLACES = [(1, "file"), (2, "s3"), (2, "file"), (1, "s3")]
"""Processes, and where; the first is a sample."""


@pytest.mark.timeout(600)
def test_a_killed_training_of_an_adapter_goes_on_with_the_same_losses(
    forks: Forks, tmp_path: Path, moto: S3Server, scale: Scale
) -> None:
    for number, (world_size, kind) in enumerate(PLACES[: scale.runs(sample=1, full=4)]):
        whole = Place(str(tmp_path / f"whole-{number}"), tmp_path / f"whole-{number}")
        (expected, *_) = forks.run(world_size, jobs.lora, whole, None, False, preload=jobs.PRELOAD)
        place = place_in(kind, tmp_path / f"killed-{number}", moto)
        killed = forks.run_settled(world_size, jobs.lora, place, 4, False)
        assert {one.killed for one in killed} == {signal.SIGKILL}
        seen = forks.run(world_size, jobs.lora, place, None, True)
        assert [one.resumed for one in seen] in ([2] * world_size, [4] * world_size)
        assert seen[0].losses == expected.losses
        assert len(expected.losses) == 8


def test_the_base_is_stored_once_and_the_adapter_goes_alone(forks: Forks, tmp_path: Path) -> None:
    place = Place(str(tmp_path), tmp_path)
    (seen,) = forks.run(1, jobs.lora_looked_at, place, preload=jobs.PRELOAD)
    assert seen == {
        "adapter is that of the step": True,
        "base stays as it was": True,
        "no more is read": True,
        "PEFT opens the copy": True,
        "only the adapter is in it": True,
        "a model without an adapter": "a GPT2LMHeadModel has no adapter of PEFT: give what get_peft_model returned",
        "from_pretrained": "load it with adapter_only(model), or open its copy, <output_dir>/checkpoint-<step>, with "
        "PeftModel.from_pretrained",
    }
    base, *steps = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (tmp_path / "blobs", *sorted(tmp_path.glob("step_*")))
    ]
    assert len(steps) == 2
    assert all(nbytes < base / 4 for nbytes in steps), (base, steps)
