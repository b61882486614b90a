"""`RngState` restores every random stream, of all devices too; and if it forgot one, that would be seen."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardckpt as sc

STREAMS = ("python", "numpy", "torch", "cuda")


class Accelerator:
    """What torch has for a kind of device, for two of them whose streams are the host's."""

    def __init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(number) for number in range(2)]

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.generators[device].get_state()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.generators[device].set_state(state)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    return made


class Forgetful(sc.RngState):
    def __init__(self, streams: tuple[str, ...]) -> None:
        self._streams = streams

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        now = self.state_dict()
        super().load_state_dict({**state_dict, **{stream: now[stream] for stream in self._streams}})


def draw(accelerator: Accelerator) -> dict[str, Any]:
    """Some of every kind: Gaussian ones are made in pairs, of which the second is kept for the next time."""
    return {
        "python": (random.random(), random.gauss(0, 1), random.sample(range(100), 3)),
        "numpy": (np.random.rand(), np.random.randn(), np.random.permutation(9).tolist()),
        "torch": (torch.rand(3).tolist(), torch.randn(20).tolist(), torch.randperm(9).tolist()),
        "cuda": [torch.rand(3, generator=generator).tolist() for generator in accelerator.generators],
    }


@pytest.mark.parametrize("forgotten", [(), *((stream,) for stream in STREAMS)], ids=str)
def test_every_stream_goes_on_where_it_was(
    tmp_path: Path, accelerator: Accelerator, forgotten: tuple[str, ...]
) -> None:
    draw(accelerator)
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"rng": sc.RngState()}).result()
        expected = draw(accelerator)
        for _ in range(3):
            draw(accelerator)
        manager.resume({"rng": Forgetful(forgotten)})
    found = draw(accelerator)
    assert {stream for stream in STREAMS if found[stream] != expected[stream]} == set(forgotten)


@pytest.mark.gpu
def test_streams_of_a_real_device(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        torch.rand(3, device="cuda")
        manager.save(1, {"rng": sc.RngState()}).result()
        expected = torch.rand(3, device="cuda")
        manager.resume({"rng": sc.RngState()})
        assert torch.equal(torch.rand(3, device="cuda"), expected)
