"""Both faces on one run, with real sharded models: each loads what the other wrote. Ranks are processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import shardckpt as sc
from tests.distributed.jobs import Job, Layout, checkpoints, differences

FSDP = Layout(2)


def given(job: Job, *, names: bool) -> dict[str, Any]:
    """What a program of fairseq2's kind hands in; `names`: the optimizer's state by parameter name, as DCP has it."""
    by_name = get_optimizer_state_dict(job.model, job.optimizer) if names else job.optimizer.state_dict()
    return {
        "model": job.model.state_dict(),
        "optimizer": by_name,
        "scheduler": job.scheduler.state_dict(),
        "progress": dict(job.progress),
    }


def live(job: Job) -> dict[str, Any]:
    return {key: value for key, value in job.state().items() if key != "rng"}


def take(job: Job, state: dict[str, Any], *, names: bool) -> None:
    """As such a program restores itself."""
    job.model.load_state_dict(state["model"])
    if names:
        set_optimizer_state_dict(job.model, job.optimizer, state["optimizer"])
    else:
        job.optimizer.load_state_dict(state["optimizer"])
    job.scheduler.load_state_dict(state["scheduler"])
    job.progress.update(state["progress"])


def trained(layout: Layout, steps: int) -> Job:
    job = Job(layout, seed=0)
    for _ in range(steps):
        job.train_step()
    return job


def wrong(job: Job, other: Job) -> list[str]:
    """What differs between two jobs now, and after one more step of both."""
    found = list(differences(job.gathered(), other.gathered()))
    losses = job.train_step(), other.train_step()
    return found + ([f"losses {losses}"] if losses[0] != losses[1] else [])


def begin_save_commit(manager: sc.CheckpointManager, step: int, state: dict[str, Any], **options: Any) -> None:
    manager.begin_checkpoint(step)
    manager.save_state(state, **options)
    manager.commit_checkpoint()


def state_dicts_there_and_back(rank: int, world_size: int, folder: Path, layout: Layout, names: bool) -> list[str]:
    job = trained(layout, 2)
    alike = None if layout.data == "fsdp" else {"*"}
    with checkpoints(folder / "run", job.mesh) as manager:
        begin_save_commit(manager, 2, given(job, names=names), replicated_keys=alike)
        job.train_step()
        step, state = manager.load_last_checkpoint()
        sharded = [name for name, value in state["model"].items() if isinstance(value, DTensor)]
        again = Job(layout, seed=5)
        take(again, state, names=names)
        expected = trained(layout, step)
        return wrong(again, expected) + (["nothing is sharded"] if layout.data == "fsdp" and not sharded else [])


@pytest.mark.parametrize("names", [True, False], ids=["by name", "by number"])
@pytest.mark.parametrize("layout", [FSDP, Layout(2, data="copies"), Layout(2, 2)], ids=str)
@pytest.mark.sampled(2)
def test_state_dicts_there_and_back(ranks, layout, names):
    assert ranks.run(layout.ranks, state_dicts_there_and_back, layout, names) == [[]] * layout.ranks


def resume_what_a_transaction_wrote(rank: int, world_size: int, folder: Path) -> list[str]:
    job = trained(FSDP, 2)
    with checkpoints(folder / "run", job.mesh) as manager:
        begin_save_commit(manager, 2, given(job, names=True), replicated_keys={"scheduler", "progress"})
        again = Job(FSDP, seed=5)
        resumed = manager.resume(live(again))
        assert resumed is not None
        assert resumed.step == 2
        return wrong(again, job)


def test_live_objects_resume_from_a_step_of_state_dicts(ranks):
    assert ranks.run(2, resume_what_a_transaction_wrote) == [[]] * 2


def resume_what_has_numbers(rank: int, world_size: int, folder: Path) -> tuple[list[str], list[str]]:
    job, again, fresh = trained(FSDP, 2), Job(FSDP, seed=5), Job(FSDP, seed=5)
    with checkpoints(folder / "run", job.mesh) as manager:
        begin_save_commit(manager, 2, given(job, names=False), replicated_keys={"scheduler", "progress"})
        with pytest.raises(sc.CheckpointMismatchError) as caught:
            manager.resume(live(again))
        assert caught.value.step == 2
        return wrong(again, fresh), list(caught.value.problems)


def test_an_optimizer_state_by_number_is_not_taken_for_one_by_name(ranks):
    """Which parameter a number means is not known; all of it is named, and nothing is loaded."""
    for changed, problems in ranks.run(2, resume_what_has_numbers):
        assert not changed
        assert any("unexpected: optimizer.state.1.exp_avg is in the checkpoint" in problem for problem in problems)
        assert all("optimizer." in problem for problem in problems)


def resume_by_number(rank: int, world_size: int, folder: Path, layout: Layout) -> list[str]:
    job, again = trained(FSDP, 2), Job(layout, seed=5)
    with checkpoints(folder / "run", job.mesh) as manager:
        begin_save_commit(manager, 2, given(job, names=False), replicated_keys={"scheduler", "progress"})
    with checkpoints(folder / "run", again.mesh) as manager:
        manager.resume(live(again), policy=sc.LoadPolicy(optimizers="by_number"))
    return list(differences(job.gathered(), again.gathered()))


@pytest.mark.parametrize("layout", [FSDP, Layout(1, 2)], ids=str)
def test_an_optimizer_state_by_number_is_taken_for_one_if_the_program_says_so(ranks, layout):
    """On the same and on another mesh: the program makes its groups in the same way on both."""
    assert ranks.run(2, resume_by_number, layout) == [[]] * 2


def load_what_save_wrote(rank: int, world_size: int, folder: Path) -> list[str]:
    job = trained(FSDP, 2)
    with checkpoints(folder / "run", job.mesh) as manager:
        manager.save(2, live(job), replicated=("scheduler", "progress")).result()
        again = Job(FSDP, seed=5)
        take(again, manager.load_checkpoint(2), names=True)
        return wrong(again, job)


def test_a_dict_from_a_step_that_save_wrote(ranks):
    assert ranks.run(2, load_what_save_wrote) == [[]] * 2


def take_turns(rank: int, world_size: int, folder: Path) -> list[Any]:
    """save, transaction, save, ... of one training, each over the other's; what is in force at the end."""
    job, found = Job(FSDP, seed=0), []
    with checkpoints(folder / "run", job.mesh) as manager:
        for number in range(1, 7):
            job.train_step()
            step = number % 4  # 1 2 3 0 1 2: some replace a step of the other face
            if number % 2:
                manager.save(step, live(job))
                manager.save_score(number, step=step)
            else:
                manager.begin_checkpoint(step)
                manager.save_state(live(job))
                manager.save_score(number)
                manager.commit_checkpoint(blocking=False)
        manager.wait()
        found.append(manager.get_step_numbers())
        found += [manager.load_checkpoint(step)["progress"]["step"] for step in found[0]]
        manager.keep_best_n_checkpoints(2)
        found.append(manager.steps())
    return found


def test_the_faces_take_turns(ranks):
    assert ranks.run(2, take_turns) == [[[0, 1, 2, 3], 4, 5, 6, 3, [1, 2, 3]]] * 2


def write_the_model_too(rank: int, world_size: int, folder: Path, root: Path, state_first: bool) -> list[str]:
    job = trained(FSDP, 2)
    whole = {name: full(value) for name, value in job.model.state_dict().items()}
    with checkpoints(root, job.mesh) as manager:
        calls: list[Callable[[], None]] = [
            lambda: manager.save_state(given(job, names=True), replicated_keys={"scheduler", "progress"}),
            lambda: manager.save_consolidated_fsdp_model(job.model),
        ]
        manager.begin_checkpoint(2)
        for call in calls if state_first else reversed(calls):
            call()
        manager.commit_checkpoint()
        again = Job(FSDP, seed=5)
        take(again, manager.load_checkpoint(2), names=True)
        problems = wrong(again, job)
        content = torch.load(root / "step_2" / "model.pt", weights_only=True)
        problems += differences(dict(content["model"]), whole)
        manager.delete_checkpoint(2, preserve_model=True)
        return problems + [f"alone: {key}" for key in differences(dict(manager.load_checkpoint(2)["model"]), whole)]


def full(value: Any) -> torch.Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().clone()


@pytest.mark.parametrize("state_first", [True, False])
def test_the_whole_model_beside_its_shards(ranks, tmp_path, state_first):
    assert ranks.run(2, write_the_model_too, tmp_path, state_first) == [[]] * 2
    assert {path.name for path in (tmp_path / "step_2").iterdir()} == {"model.pt", "manifest.json"}


def save_on_two(rank: int, world_size: int, folder: Path, root: Path) -> None:
    job = trained(FSDP, 2)
    with checkpoints(root, job.mesh) as manager:
        begin_save_commit(manager, 2, given(job, names=True), replicated_keys={"scheduler", "progress"})


def load_on_others(rank: int, world_size: int, folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """The problems of the dict, and what is wrong with live objects after a load."""
    layout = Layout(world_size)
    job, again = trained(layout, 2), Job(layout, seed=5)
    with checkpoints(root, again.mesh) as manager:
        with pytest.raises(sc.CheckpointMismatchError) as caught:
            manager.load_last_checkpoint()
        assert caught.value.step == 2
        manager.load(2, live(again))
    loose = differences(again.gathered(), job.gathered())
    return list(caught.value.problems), [key for key in loose if not key.startswith(("model", "moment"))]


@pytest.mark.parametrize("size", [1, 4])
def test_shards_of_other_ranks(ranks, tmp_path, size):
    """A dict of whole tensors is nobody's to give on another number of ranks; live objects say what they want."""
    ranks.run(2, save_on_two, tmp_path)
    for problems, loose in ranks.run(size, load_on_others, tmp_path):
        named = {problem.split(": ")[1].split(" was saved")[0] for problem in problems}
        assert {"model.blocks.0.up.weight", "optimizer.state.blocks.0.up.weight.exp_avg"} <= named
        assert not any(name.startswith(("scheduler", "progress")) for name in named)
        assert not loose


def abort_on_one(rank: int, world_size: int, folder: Path, root: Path, who: int) -> str:
    job = trained(FSDP, 1)
    told = ""
    with checkpoints(root, job.mesh) as manager:
        manager.begin_checkpoint(1)
        manager.save_state(given(job, names=True))
        if rank == who:
            manager.abort_checkpoint()
        else:
            with pytest.raises(sc.CheckpointSaveError) as caught:
                manager.commit_checkpoint()
            told = str(caught.value)
        begin_save_commit(manager, 1, given(job, names=True))
        assert manager.load_last_checkpoint()[0] == 1
    return told


@pytest.mark.parametrize("who", [0, 1])
def test_abort_on_one_process_only(ranks, tmp_path, who):
    told = ranks.run(2, abort_on_one, tmp_path, who)
    assert f"rank {who}: CheckpointSaveError" in told[1 - who]
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
