"""Interrupted and resumed is the same as uninterrupted, bit for bit; and the check that says so sees what is not."""

from __future__ import annotations

from functools import partial

import pytest

from shardckpt.testing.resumable import assert_resumable
from tests.testing.trainings import drifting, everything, job_on


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_training_is_uninterrupted_training(ranks, world_size):
    """AMP scaler, schedule, loader workers, dropout, accumulation; over the end of an epoch."""
    assert_resumable(partial(everything, workers=2), before=(world_size,), pool=ranks)


def test_on_other_meshes(ranks):
    """FSDP2 and TP: what is loaded is the same to the last bit, and the losses are about the same."""
    assert_resumable(job_on, before=(2, 1), after=[(1, 2), (1, 1)], pool=ranks)


@pytest.mark.parametrize("stream", ["python", "numpy", "torch"])
def test_a_random_stream_that_is_not_restored_is_found(ranks, stream):
    with pytest.raises(AssertionError, match=rf"after the load of step 2, rank 0: rng\.{stream} differs"):
        assert_resumable(partial(everything, forget=stream), pool=ranks)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("scheduler", r"after step 3, rank 0: optimizer\.param_groups\.0\.lr differs$"),
        ("data", r"after step 3, rank 0: model\.0\.weight differs, and the loss: "),
        ("rng", r"after step 3, rank 0: model\.0\.weight differs, and the loss: "),
        ("scaler", r"after step 3, rank 0: model\.0\.weight differs$"),
    ],
)
def test_a_part_that_is_not_in_the_state_is_found(ranks, part, told):
    with pytest.raises(AssertionError, match=told):
        assert_resumable(partial(everything, without=part), pool=ranks)


def test_a_tensor_that_is_not_what_was_saved_is_found_on_another_mesh(ranks):
    with pytest.raises(AssertionError, match=r"resumed on \(1, 1\): after the load of step 2: model\.frozen differs"):
        assert_resumable(drifting, before=(2, 1), after=[(1, 1)], pool=ranks)
