"""What data-parallel ranks are taken to hold alike is stored once, and only if they do; what they hold is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from tests.distributed.jobs import Job, Layout, checkpoints

COPIES = [Layout(4, 1, "ddp"), Layout(2, 2, "copies"), Layout(2, 2)]
LAST = 3


def spoil_buffer(job: Job) -> str:
    job.model.seen.add_(1)
    return "model.seen"


def spoil_parameter(job: Job) -> str:
    """Of DTensors only each rank's own shard could be spoilt, so that this one is plain wherever nothing shards it."""
    with torch.no_grad():
        job.model.blocks[1].norm.weight[0] += 1  # type: ignore[union-attr, index, operator]
    return "model.blocks.1.norm.weight"


def spoil_moment(job: Job) -> str:
    job.optimizer.state[job.model.blocks[0].norm.bias]["step"] += 1  # type: ignore[index, union-attr]
    return "optimizer.state.blocks.0.norm.bias.step"


def save_unlike(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[tuple[str, str]]:
    """Save with each kind of difference on the last rank, and with none after each: (what differed, what was said)."""
    spoilers = [spoil_buffer, spoil_moment] + ([spoil_parameter] if layout.data in ("copies", "ddp") else [])
    job, told = Job(layout, seed=0), []
    job.train_step()
    with checkpoints(root, job.mesh) as manager:
        for step, spoil in enumerate(spoilers, 1):
            spoilt = Job(layout, seed=0)
            spoilt.train_step()
            key = spoil(spoilt) if rank == LAST else ""
            with pytest.raises(sc.CheckpointSaveError) as caught:
                manager.save(step, spoilt.state()).result()
            told.append((key, str(caught.value)))
            assert manager.steps() == list(range(1, step))
            assert len(list(root.iterdir())) == step - 1
            manager.save(step, job.state()).result()
            assert manager.latest() == step
        manager.load(1, job.state())
    return told


@pytest.mark.parametrize("layout", COPIES, ids=str)
@pytest.mark.sampled(2)
def test_copies_that_differ_are_never_lost(ranks, tmp_path, layout):
    """Only one of them would have been stored: the save fails on all ranks, says which, and the next one succeeds."""
    outcomes = ranks.run(4, save_unlike, tmp_path, layout)
    assert len(outcomes[LAST]) >= 2
    for number, (key, message) in enumerate(outcomes[LAST]):
        assert {told[number][1] for told in outcomes} == {message}
        assert key in message
        other = 1 if layout.tp == 2 else 0
        assert f"ranks {other} and {LAST}" in message


def save_more(rank: int, world_size: int, folder: Path, root: Path) -> str:
    """A model that has one more buffer on the last rank, which would have nobody to write it."""
    job = Job(Layout(world_size, 1, "copies"), seed=0)
    if rank == world_size - 1:
        job.model.register_buffer("more", torch.ones(2))
    with checkpoints(root, job.mesh) as manager:
        with pytest.raises(sc.CheckpointSaveError) as caught:
            manager.save(1, job.state()).result()
        assert manager.steps() == []
    return str(caught.value)


def test_keys_that_only_one_of_the_copies_has(ranks, tmp_path):
    for message in ranks.run(2, save_more, tmp_path):
        assert "model.more (rank 1 has it, rank 0 does not)" in message


def declare_more(rank: int, world_size: int, folder: Path, root: Path, having: int) -> str:
    with checkpoints(root, Layout(2).mesh()) as manager:
        with pytest.raises(sc.CheckpointSaveError) as caught:
            manager.save(1, {"epoch": 1} if rank == having else {}, replicated="*").result()
        assert manager.steps() == []
    return str(caught.value)


@pytest.mark.parametrize("having", [0, 1])
def test_a_file_that_only_one_of_its_writers_knows_of(ranks, tmp_path, having):
    for message in ranks.run(2, declare_more, tmp_path, having):
        assert f"epoch (rank {having} has it, rank {1 - having} does not)" in message


def declare_values(rank: int, world_size: int, folder: Path, root: Path) -> str:
    with checkpoints(root, Layout(2).mesh()) as manager, pytest.raises(sc.CheckpointSaveError) as caught:
        manager.save(1, {"epoch": rank, "same": [1, {"a": 2}]}, replicated=["epoch", "same"]).result()
    return str(caught.value)


def test_values_that_are_declared_alike_must_be(ranks, tmp_path):
    for message in ranks.run(2, declare_values, tmp_path):
        assert "epoch (for example ranks 0 and 1)" in message
        assert "same (" not in message


def save_own(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[list[float]]:
    """Plain tensors that differ, under a key that is not declared: of each rank its own, back on the same ranks."""
    cache, deep = torch.full((3,), float(rank)), {"a": [torch.full((rank,), 1.0)], "alike": torch.ones(2)}
    with checkpoints(root, layout.mesh()) as manager:
        manager.save(1, {"cache": cache, "deep": deep}).result()
        cache.zero_()
        deep["a"][0].zero_()  # type: ignore[index]
        manager.load(1, {"cache": cache, "deep": deep})
    return [cache.tolist(), deep["a"][0].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("layout", [Layout(4), Layout(2, 2), Layout(1, 4)], ids=str)
def test_plain_tensors_that_nobody_declared_are_kept_per_rank(ranks, tmp_path, layout):
    found = ranks.run(4, save_own, tmp_path, layout)
    assert found == [[[float(rank)] * 3, [1.0] * rank] for rank in range(4)]


def save_declared(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> tuple[str, list[str]]:
    """The same, but declared to be alike: what is said, and the files of a save in which they are."""
    with checkpoints(root, layout.mesh()) as manager:
        with pytest.raises(sc.CheckpointSaveError) as caught:
            manager.save(1, {"cache": torch.full((3,), float(rank))}, replicated=["cache"]).result()
        manager.save(1, {"cache": torch.ones(3)}, replicated=["cache"]).result()
    return str(caught.value), sorted(path.name for path in (root / "step_1").glob("*.pt"))


def test_plain_tensors_that_are_declared_alike_must_be(ranks, tmp_path):
    for message, files in ranks.run(4, save_declared, tmp_path, Layout(4)):
        assert "cache (for example ranks 0 and 1)" in message
        assert files == ["replicated.pt"]


def shards_of_own(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[list[float]]:
    """Tensor parallelism by hand: plain parameters of a tensor-parallel rank's own. Saved and loaded again."""
    mesh = layout.mesh()
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 + mesh["tp"].get_local_rank())
    if layout.data == "fsdp" and layout.dp > 1:
        fully_shard(model, mesh=mesh["dp"])
    with checkpoints(root, mesh) as manager:
        manager.save(1, {"model": model}).result()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        manager.load(1, {"model": model})
    wholes = [getattr(parameter, "full_tensor", parameter.detach)() for parameter in model.parameters()]
    return [whole.unique().tolist() for whole in wholes]


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(2, 2, "copies")], ids=str)
def test_tensor_parallelism_by_hand(ranks, tmp_path, layout):
    for rank, found in enumerate(ranks.run(4, shards_of_own, tmp_path, layout)):
        assert found == [[1.0 + rank % layout.tp]] * 2


def refused(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> str:
    with pytest.raises(sc.CheckpointSaveError) as caught:
        shards_of_own(rank, world_size, folder, root, layout)
    return str(caught.value)


def test_what_is_cut_by_hand_and_then_sharded_by_fsdp_is_not_taken_for_copies(ranks, tmp_path):
    """FSDP's mesh says nothing of "tp", along which they would be copies: that is assumed, compared, found wrong."""
    for message in ranks.run(4, refused, tmp_path, Layout(2, 2)):
        assert "model.bias (for example ranks 0 and 1); model.weight (for example ranks 0 and 1)" in message
    assert list(tmp_path.iterdir()) == []


def load_by_hand(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> Any:
    model = nn.Linear(4, 2)
    with checkpoints(root, layout.mesh()) as manager, pytest.raises(sc.CheckpointMismatchError) as caught:
        manager.load(1, {"model": model})
    return sorted(problem.split(" was saved")[0] for problem in caught.value.problems)


def test_nobody_can_put_together_what_was_cut_by_hand(ranks, tmp_path):
    ranks.run(4, shards_of_own, tmp_path, Layout(2, 2, "copies"))
    assert ranks.run(1, load_by_hand, tmp_path, Layout(1)) == [["per rank: model.bias", "per rank: model.weight"]]


class Growing(nn.Module):
    """A large parameter, and a buffer that every forward changes, as batch normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8 << 20))
        self.register_buffer("seen", torch.zeros(4))


def save_and_go_on(rank: int, world_size: int, folder: Path, root: Path) -> str:
    """The buffer changes as soon as `save` has returned, while the large parameter is still being copied or summed."""
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with checkpoints(root, Layout(world_size).mesh()) as manager:
        pending = manager.save(1, {"model": model, "optimizer": optimizer})
        model.seen.add_(1)  # type: ignore[operator]
        try:
            pending.result()
        except sc.CheckpointSaveError as error:
            return str(error)
        manager.load(1, {"model": model, "optimizer": optimizer})
    return str(model.seen.tolist())  # type: ignore[operator, union-attr]


def test_buffers_may_change_as_soon_as_save_has_returned(ranks, tmp_path):
    assert ranks.run(2, save_and_go_on, tmp_path) == [str([0.0] * 4)] * 2
