"""Steps of the model alone, and the model file: beside the ranks' own files, in either order, and by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from tests.manager.transactions import Size, equal, files_in, on_ranks, opened, same, state_of, transact


def model_of(number: float) -> nn.Sequential:
    """The same on all ranks: threads share torch's generator."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.fill_(number + place)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("size", [Size(1), Size(2), Size(2, 2)], ids=str)
def test_a_transaction_with_only_the_model(tmp_path: Path, size: Size) -> None:
    """It commits; it is a model for whoever asks for one, and nothing that a training goes on from."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        manager.save_consolidated_fsdp_model(model_of(1))
        manager.save_score(0.5)
        manager.commit_checkpoint()
        assert manager.get_step_numbers() == [1]
        assert manager.has_checkpoint(1)
        equal(manager.load_checkpoint(1), {"model": whole(model_of(1))})
        with pytest.raises(sc.CheckpointNotFoundError, match="no checkpoint to go on from"):
            manager.load_last_checkpoint()
        transact(manager, 2, state_of(gangs))
        for step in (3, 4):
            manager.begin_checkpoint(step)
            manager.save_consolidated_fsdp_model(model_of(step))
            manager.commit_checkpoint()
        equal(manager.load_last_checkpoint(), (2, state_of(gangs)))
        equal(manager.load_checkpoint(4), {"model": whole(model_of(4))})

    on_ranks(size, tmp_path, act)
    assert files_in(tmp_path / "step_1") == {"model.pt", "manifest.json", "score.txt"}
    content = opened(tmp_path / "step_1")["model.pt"]
    equal(dict(content["model"]), whole(model_of(1)))
    assert content["model_key"] == "model"


def test_live_objects_go_on_from_the_last_full_step(tmp_path: Path) -> None:
    """`resume` passes over steps of the model alone; `load` gives the model of one, and refuses to give more."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model = model_of(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        manager.save(1, {"model": model, "optimizer": optimizer, "epoch": 1}).result()
        manager.begin_checkpoint(2)
        manager.save_consolidated_fsdp_model(model_of(2))
        manager.commit_checkpoint()
        state: dict[str, Any] = {"model": model_of(9), "optimizer": optimizer, "epoch": 9}
        with pytest.raises(sc.CheckpointMismatchError, match="only the model is there") as caught:
            manager.load(2, state)
        assert caught.value.step == 2
        assert state["epoch"] == 9
        equal(whole(state["model"]), whole(model_of(9)))
        resumed = manager.resume(state)
        assert resumed is not None
        assert (resumed.step, state["epoch"]) == (1, 1)
        equal(whole(state["model"]), whole(model_of(1)))
        manager.load(2, {"model": state["model"]})
        equal(whole(state["model"]), whole(model_of(2)))

    on_ranks(Size(2), tmp_path, act)


@pytest.mark.parametrize("state_first", [True, False])
@pytest.mark.parametrize("key", ["model", "net"])
def test_one_process_has_one_model_file(tmp_path: Path, state_first: bool, key: str) -> None:
    """The state's model.pt is the whole model already; the other one is not written, or goes."""
    model = model_of(3)
    state = {key: model.state_dict(), "epoch": 5}
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.begin_checkpoint(1)
        if state_first:
            manager.save_state(state, model_key=key)
        manager.save_consolidated_fsdp_model(model)
        if not state_first:
            manager.save_state(state, model_key=key)
        manager.commit_checkpoint()
        equal(manager.load_checkpoint(1), {key: dict(model.state_dict()), "epoch": 5})
        manager.delete_checkpoint(1, preserve_model=True)
        equal(manager.load_checkpoint(1), {key: dict(model.state_dict())})
    assert files_in(tmp_path) == {"step_1/model.pt", "step_1/manifest.json"}
    assert opened(tmp_path / "step_1")["model.pt"]["model_key"] == key


@pytest.mark.parametrize("state_first", [True, False])
@pytest.mark.parametrize("replicated", [None, {"model"}, {"*"}], ids=str)
def test_ranks_with_a_model_file_beside_their_own(
    tmp_path: Path, replicated: set[str] | None, state_first: bool
) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        state = {"model": whole(model_of(3)), "position": gangs.root.rank if replicated != {"*"} else 0}
        manager.begin_checkpoint(1)
        if state_first:
            manager.save_state(state, replicated_keys=replicated)
        manager.save_consolidated_fsdp_model(model_of(3))
        if not state_first:
            manager.save_state(state, replicated_keys=replicated)
        manager.commit_checkpoint()
        equal(manager.load_checkpoint(1), state)

    on_ranks(Size(2), tmp_path, act)
    rest = {"replicated.pt"} if replicated == {"*"} else {"rank_0.pt", "rank_1.pt"}
    assert files_in(tmp_path / "step_1") == {"model.pt", "manifest.json"} | rest
    equal(dict(opened(tmp_path / "step_1")["model.pt"]["model"]), whole(model_of(3)))
    on_ranks(Size(2), tmp_path, lambda manager, gangs: manager.delete_checkpoint(1, preserve_model=True))
    assert files_in(tmp_path / "step_1") == {"model.pt", "manifest.json"}
    for size in (Size(1), Size(2), Size(4)):  # a whole model is nobody's own
        on_ranks(
            size,
            tmp_path,
            lambda manager, gangs: equal(manager.load_checkpoint(1), {"model": whole(model_of(3))}),
        )


def test_a_state_whose_names_are_not_those_of_the_model(tmp_path: Path) -> None:
    """As of a wrapped model: the consolidated file has the plain names. A rank gets back what it gave, and no more."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        wrapped = {f"_orig_mod.{name}": value for name, value in whole(model_of(3)).items()}
        manager.begin_checkpoint(1)
        manager.save_state({"model": wrapped, "epoch": gangs.root.rank})
        manager.save_consolidated_fsdp_model(model_of(3))
        manager.commit_checkpoint()
        equal(manager.load_checkpoint(1), {"model": wrapped, "epoch": gangs.root.rank})

    on_ranks(Size(2), tmp_path, act)
    equal(dict(opened(tmp_path / "step_1")["model.pt"]["model"]), whole(model_of(3)))


@pytest.mark.parametrize("replicated", [None, {"epoch"}, {"model"}, {"*"}], ids=str)
@pytest.mark.parametrize("size", [Size(1), Size(2), Size(2, 2)], ids=str)
def test_only_the_model_of_a_step_is_kept(tmp_path: Path, size: Size, replicated: set[str] | None) -> None:
    """Wherever it lies; each rank gets the model that it saved, and nothing of what lies in the same file."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for step in (1, 2, 3):
            manager.begin_checkpoint(step)
            manager.save_state(state_of(gangs, replicated or (), base=step), replicated_keys=replicated)
            manager.save_metadata({"of": step})
            manager.save_score(-step)
            manager.commit_checkpoint()
        manager.keep_last_n_checkpoints(2, preserve_model=True)
        manager.keep_last_n_checkpoints(1, preserve_model=True)
        assert manager.get_step_numbers() == [1, 2, 3]
        for step in (1, 2):
            expected = state_of(gangs, replicated or (), base=step)
            equal(manager.load_checkpoint(step), {"model": expected["model"]})
            assert manager.load_metadata(step) is None
        equal(manager.load_last_checkpoint(), (3, state_of(gangs, replicated or (), base=3)))
        manager.delete_checkpoint(3)
        with pytest.raises(sc.CheckpointNotFoundError):
            manager.load_last_checkpoint()
        manager.keep_best_n_checkpoints(1)
        assert manager.get_step_numbers() == [1, 2]

    on_ranks(size, tmp_path, act)
    assert (tmp_path / "step_1" / "score.txt").read_text() == "-1.0\n"


def test_ranks_that_hold_other_models_have_no_common_one(tmp_path: Path) -> None:
    """All ranks are told which tensors differ; nothing is committed."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        with pytest.raises(sc.CheckpointSaveError, match=r"0\.weight \(for example ranks 0 and 1\)") as caught:
            manager.save_consolidated_fsdp_model(model_of(gangs.root.rank))
        assert caught.value.step == 1

    on_ranks(Size(2), tmp_path, act)
    assert files_in(tmp_path) == set()


def test_the_comparison_of_these_tests_tells_states_apart() -> None:
    one = {"a": torch.ones(2), "b": [1, (2.0, None)]}
    for other in (
        {**one, "a": torch.ones(2, dtype=torch.float64)},
        {**one, "a": torch.tensor([1.0, 2.0])},
        {**one, "a": torch.ones(2, 1)},
        {**one, "b": [1, [2.0, None]]},
        {**one, "b": [True, (2.0, None)]},
        {**one, "c": 1},
        {"a": one["a"]},
    ):
        assert not same(one, other)
    assert same(one, {"b": [1, (2.0, None)], "a": torch.ones(2)})
