"""The component that torchtitan's trainer has its config build, which came with 0.3.

With an older one this only tests what is said then. 0.3 pins versions of its own, so it is run in an environment of its
own: `pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing==0.1.1 triton`, and this file.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.integrations.forks import Forks

pytestmark = pytest.mark.xdist_group("titan")

IS_OLD = tuple(map(int, version("torchtitan").split(".")[:2])) < (0, 3)


class Counter:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]


def build_and_use(rank: int, world_size: int, folder: Path, root: Path) -> list[list[int]]:
    """The steps that each of two jobs made."""
    from torchtitan.components.checkpointer import BaseCheckpointManager

    from shardckpt.integrations.titan import component
    from tests.integrations.titan import standins  # noqa: F401  before torchtitan

    made: list[list[int]] = []
    for last in (4, 6):
        model, train_state = torch.nn.Linear(2, 2), Counter()
        optimizer = torch.optim.AdamW(model.parameters())
        config = component().Config(enable=True, interval=2, keep_latest_k=2, last_save_model_only=False)
        checkpointer = config.build(
            dataloader=None,
            model_parts=[model],
            optimizers=optimizer,
            lr_schedulers=torch.optim.lr_scheduler.StepLR(optimizer, 2),
            states={"train_state": train_state},
            sd_adapter=None,
            base_folder=str(root),
        )
        assert isinstance(checkpointer, BaseCheckpointManager)
        assert checkpointer.load(step=config.load_step) is (last == 6)
        made.append([])
        while train_state.step < last:
            train_state.step += 1
            model(torch.ones(1, 2)).sum().backward()
            checkpointer.maybe_wait_for_staging()
            optimizer.step()
            assert checkpointer.save(train_state.step, last_step=train_state.step == last) is (
                train_state.step % 2 == 0
            )
            made[-1].append(train_state.step)
        checkpointer.maybe_wait_for_saving()
        checkpointer.close()
        checkpointer.close()  # as its __del__ does
    return made


def say_what_is_wrong(rank: int, world_size: int, folder: Path) -> str:
    from shardckpt.integrations.titan import component
    from tests.integrations.titan import standins  # noqa: F401  before torchtitan

    with pytest.raises(RuntimeError) as told:
        component()
    return str(told.value)


def test_the_trainers_config_builds_it(forks: Forks, tmp_path: Path) -> None:
    if IS_OLD:
        assert "put Checkpointer where its trainer has" in forks.run(1, say_what_is_wrong)[0]
    else:
        assert forks.run(1, build_and_use, tmp_path) == [[[1, 2, 3, 4], [5, 6]]]
