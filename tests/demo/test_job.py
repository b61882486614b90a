"""What the ranks do: one training on every mesh, and a save that stalls."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from shardckpt.demo.job import MAX_NORM, StallingStorage, Trainer
from shardckpt.demo.messages import Mesh, Training
from shardckpt.storage import MemoryStorage

TEXT = "Whether 'tis nobler in the mind to suffer the slings and arrows. " * 200


def train(rank: int, world_size: int, folder: Path, mesh: Mesh, steps: int) -> dict[str, Any]:
    """On a rank: the losses, and what the random streams and the data position have come to."""
    text = folder / f"text_{rank}"
    text.write_text(TEXT)
    training = Training(size="tiny", steps=steps, batch=4, seed=3, text=str(text))
    trainer = Trainer(training, init_device_mesh("cpu", (mesh.dp, mesh.tp), mesh_dim_names=("dp", "tp")))
    losses = [trainer.train_step() for _ in range(steps)]
    return {
        "losses": losses,
        "rng": torch.get_rng_state().numpy().tobytes(),
        "data": trainer.data.state_dict(),
        "tokens": trainer.state["tokens"],
    }


@pytest.mark.slow
def test_a_training_is_the_same_on_every_mesh(ranks):
    (plain,) = ranks.run(1, train, Mesh(1, 1), 4)
    assert plain["losses"][3] < plain["losses"][0]
    assert plain["tokens"] == 4 * 4 * 32
    for mesh in (Mesh(2, 1), Mesh(1, 2), Mesh(2, 2), Mesh(4, 1)):
        every = ranks.run(mesh.ranks, train, mesh, 4)
        for rank, one in enumerate(every):
            assert one["losses"] == every[0]["losses"], f"rank {rank} of {mesh} has other losses than rank 0"
            assert one["losses"] == pytest.approx(plain["losses"], abs=1e-5), f"rank {rank} of {mesh}"
            assert {key: one[key] for key in ("rng", "data", "tokens")} == {
                key: plain[key] for key in ("rng", "data", "tokens")
            }
        if mesh == Mesh(2, 2):
            again = ranks.run(4, train, mesh, 4)
            assert [one["losses"] for one in again] == [one["losses"] for one in every], "to the last bit"


def norms(rank: int, world_size: int, folder: Path) -> list[tuple[float, float]]:
    """On the only rank: the norm of each step's clipped gradient as torch counts it, and as it was before."""
    text = folder / "text"
    text.write_text(TEXT)
    training = Training(size="tiny", steps=3, batch=4, seed=3, text=str(text))
    trainer = Trainer(training, init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")))
    seen = []

    def look(optimizer: Any, *_: Any) -> None:
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer.optimizer.register_step_pre_hook(look)
    measure, before = trainer._mean_loss_and_norm, []

    def remember(loss: torch.Tensor) -> tuple[float, float]:
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        before.append(float(torch.nn.utils.get_total_norm(gradients)))
        mean_loss, norm = measure(loss)
        assert math.isclose(norm, before[-1], rel_tol=1e-5)
        return mean_loss, norm

    trainer._mean_loss_and_norm = remember  # type: ignore[method-assign]
    for _ in range(3):
        trainer.train_step()
    return list(zip(seen, before, strict=True))


def test_a_gradient_is_clipped_to_the_largest_norm(ranks):
    ((*pairs,),) = ranks.run(1, norms)
    assert pairs[0][1] > MAX_NORM
    for clipped, before in pairs:
        assert clipped == pytest.approx(min(before, MAX_NORM), rel=1e-5)


class StalledError(Exception):
    """In place of the wait without end."""


@pytest.mark.parametrize("key", ["step_4.0123456789ab.tmp/rank_0.pt", "step_4/0123456789ab/rank_0.pt"])
def test_a_storage_stalls_in_the_middle_of_the_step_that_is_to_be_killed(key):
    announced, taken = [], []

    def announce(key: str) -> None:
        announced.append(key)
        raise StalledError

    class Counting(MemoryStorage):
        def put(self, key, parts):
            return super().put(key, (taken.append(len(part)) or part for part in parts))

    inner = Counting()
    storage = StallingStorage(inner, 4, announce)
    with pytest.raises(StalledError):
        storage.put(key, [bytes(30), bytes(30), bytes(40)])
    assert announced == [key]
    assert sum(taken) == 50
    with pytest.raises(FileNotFoundError):
        inner.size(key)


@pytest.mark.parametrize("key", ["step_40/rank_0.pt", "step_3/rank_0.pt", "run.json"])
def test_a_storage_that_stalls_lets_every_other_step_through(key):
    storage = StallingStorage(MemoryStorage(), 4, pytest.fail)
    assert storage.put(key, [b"all of it"]) == 9
    assert storage.read(key) == b"all of it"
