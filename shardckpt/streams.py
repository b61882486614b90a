"""The random streams of a process, as a part of its state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from shardckpt.state import NewWorld


class RngState:
    """Every random stream of this process: Python, NumPy's global generator, torch's CPU and accelerator generators.

    Put it into the state as `"rng": RngState()`. It is captured when `save` is called and restored last. The streams
    belong to their rank: in a job of another size a rank takes up the stream of its own number, and a rank that had
    no counterpart keeps the stream it has.
    """

    new_world: NewWorld = "own"

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        numpy = _numpy_random()
        if numpy is not None:
            kind, keys, position, has_gauss, gauss = numpy.get_state()
            state["numpy"] = [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)]
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if device is not None:
            module = torch.get_device_module(device)
            state[device.type] = [module.get_rng_state(i) for i in range(module.device_count())]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        kind, internal, gauss = state_dict["python"]
        random.setstate((kind, tuple(internal), gauss))
        torch.set_rng_state(state_dict["torch"])
        numpy = _numpy_random()
        if numpy is not None and "numpy" in state_dict:
            kind, keys, position, has_gauss, gauss = state_dict["numpy"]
            numpy.set_state((kind, keys, position, has_gauss, gauss))
        for device in set(state_dict) - {"python", "torch", "numpy"}:
            _restore_device_streams(device, state_dict[device])


def seeded_streams(seed: int) -> dict[str, Any]:
    """What `RngState` would capture in a process whose streams have just been seeded, but for those of accelerators.

    For a checkpoint that has none: nothing tells what they were, so whoever adds them begins them anew.
    """
    streams: dict[str, Any] = {"python": random.Random(seed).getstate()}
    streams["torch"] = torch.Generator().manual_seed(seed).get_state()
    numpy = _numpy_random()
    if numpy is not None:
        kind, keys, position, has_gauss, gauss = numpy.RandomState(seed).get_state()
        streams["numpy"] = [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)]
    return streams


def _restore_device_streams(device: str, streams: list[torch.Tensor]) -> None:
    module = torch.get_device_module(device)
    for i, stream in enumerate(streams[: module.device_count()]):
        module.set_rng_state(stream.cpu(), i)


def _numpy_random() -> Any:
    try:
        import numpy as np
    except ImportError:
        return None
    return np.random
