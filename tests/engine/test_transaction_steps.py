"""Training between the parts of a transaction: what was taken is a copy, and nobody waits for the commit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.memory import MemoryObjects, MemoryStorage


@pytest.mark.timeout(60)
@pytest.mark.parametrize("live", [True, False], ids=["live objects", "state dicts"])
def test_the_optimizer_may_step_before_the_commit(tmp_path: Path, live: bool) -> None:
    """Also where an earlier `save` has had it wait for its copy."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": model, "optimizer": optimizer}).result()
        before = model.weight.detach().clone()
        checkpoints.begin_checkpoint(2)
        state = {"model": model, "optimizer": optimizer}
        checkpoints.save_state(state if live else {name: part.state_dict() for name, part in state.items()})
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        assert checkpoints.commit_checkpoint(blocking=False).result().step == 2
        assert torch.equal(checkpoints.load_checkpoint(2)["model"]["weight"], before)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_one_that_was_swept_while_it_was_open_is_not_committed(kind: type[MemoryStorage | MemoryObjects]) -> None:
    """By another job at this root: the record would name files that are gone."""
    place = kind()
    with sc.CheckpointManager(place) as checkpoints:
        for swept in (True, False):
            checkpoints.begin_checkpoint(5)
            checkpoints.save_state({"model": {"w": torch.ones(4)}})
            checkpoints.save_metadata({"config": {"lr": 1}})
            if swept:
                for name in place.list():
                    place.delete_tree(name.rstrip("/"))
                with pytest.raises(sc.CheckpointSaveError, match=r"metadata.pt .* is no longer there"):
                    checkpoints.commit_checkpoint()
                assert checkpoints.get_step_numbers() == []
        checkpoints.commit_checkpoint()
        assert checkpoints.load_metadata(5) == {"config": {"lr": 1}}
