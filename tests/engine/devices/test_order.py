"""State that lies on devices: the checkpoint has what it was where `save` was called, in whatever order streams run.

The devices are simulated (`simulated.py`), so that this is tested where there are none, and in many orders.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine import save as save_module
from shardckpt.engine.saving.image import Image
from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.stage import Stager
from shardckpt.engine.saving.staging.file import crc_of, digest_of
from shardckpt.format.manifest import Table
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.gangs import run_ranks
from tests.engine.devices.simulated import SimulatedDevices

LIMIT = timedelta(seconds=30)
TRAINING = "MainThread"
LARGE, SMALL = 70_000, 5


class Net(torch.nn.Module):
    def __init__(self, devices: SimulatedDevices, numel: int = LARGE) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(devices.put(torch.zeros(numel), "gpu 0"))
        self.small = torch.nn.Parameter(devices.put(torch.zeros(SMALL), "gpu 1"))
        self.count: torch.Tensor
        self.register_buffer("count", devices.put(torch.zeros(3), "gpu 0"))


class Adding(torch.optim.Optimizer):
    """Its step queues kernels, and returns."""

    def __init__(self, net: Net, devices: SimulatedDevices) -> None:
        super().__init__([net.large, net.small], {})
        self._devices = devices
        for parameter in (net.large, net.small):
            place = devices.place_of(parameter)
            self.state[parameter]["moment"] = devices.put(torch.zeros(parameter.shape), place)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            place = self._devices.place_of(parameter)
            moment = self.state[parameter]["moment"]
            self._devices.launch(partial(parameter.data.add_, 1), place)
            self._devices.launch(partial(moment.add_, 2), place)


class Training:
    def __init__(self, devices: SimulatedDevices, *, numel: int = LARGE) -> None:
        self.devices = devices
        self.net = Net(devices, numel)
        self.optimizer = Adding(self.net, devices)
        self.here = torch.zeros(4)  # of the host
        self.state = {"model": self.net, "optimizer": self.optimizer, "here": self.here}
        self.steps = self.counts = 0
        self.saved: dict[int, tuple[int, int]] = {}

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        self.here += 1

    def count(self) -> None:
        buffer = self.net.count
        self.devices.launch(lambda: buffer.add_(1))
        self.counts += 1

    def save(self, checkpoints: sc.CheckpointManager, step: int, **options: Any) -> sc.PendingSave:
        self.saved[step] = (self.steps, self.counts)
        return checkpoints.save(step, self.state, **options)

    def check(self, place: MemoryStorage) -> None:
        for step, (steps, counts) in self.saved.items():
            found = torch.load(io.BytesIO(place.read(f"step_{step}/model.pt")), weights_only=True)["model"]
            rest = torch.load(io.BytesIO(place.read(f"step_{step}/rank_0.pt")), weights_only=True)
            assert found["large"].unique().tolist() == [steps], f"step {step}"
            assert found["small"].unique().tolist() == [steps]
            assert found["count"].unique().tolist() == [counts]
            assert rest["here"].unique().tolist() == [steps]
            moments = [values["moment"].unique().tolist() for values in rest["optimizer"]["state"].values()]
            assert moments == [[2 * steps]] * 2


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevices:
    return use(SimulatedDevices(), monkeypatch)


def use(devices: SimulatedDevices, monkeypatch: pytest.MonkeyPatch) -> SimulatedDevices:
    monkeypatch.setattr(save_module, "Cuda", lambda ranks_here: devices)
    return devices


def train(devices: SimulatedDevices, *, saves: int = 4, **saving: Any) -> Training:
    place, training = MemoryStorage(), Training(devices)
    policy = sc.SavePolicy(**saving)
    with sc.CheckpointManager(place, sc.Gangs.local(), saving=policy, timeout=LIMIT) as checkpoints:
        for step in range(1, saves + 1):
            training.step()
            training.count()
            training.save(checkpoints, step)
            training.count()
            training.step()
            training.step()
    training.check(place)
    return training


@pytest.mark.parametrize("refusal", [None, "not today"])
@pytest.mark.parametrize("staging", ["overlap", "blocking", "none"])
def test_whatever_the_order_of_the_streams(monkeypatch: pytest.MonkeyPatch, staging: str, refusal: str | None) -> None:
    for seed in range(10):
        devices = use(SimulatedDevices(seed, refusal), monkeypatch)
        train(devices, staging=staging, verify_copies=seed % 3 == 0)
        assert bool(devices.queued_copies) == (refusal is None and staging != "none")


@pytest.mark.parametrize("without", ["hold", "mark"])
def test_this_would_find_a_copy_that_is_not_ordered(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """Training's stream that does not wait for the copy; a copy that does not wait for training's stream."""
    if without == "hold":
        monkeypatch.setattr(SimulatedDevices, "hold", lambda *_: None)
    else:
        monkeypatch.setattr(SimulatedDevices, "mark", lambda self, place: self._mark(place, "nobody's"))
    found = 0
    for seed in range(20):
        devices = use(SimulatedDevices(seed), monkeypatch)
        try:
            train(devices)
        except AssertionError:
            found += 1
    assert found > 5


def test_training_waits_for_no_device_and_memory_is_locked_once(devices: SimulatedDevices) -> None:
    train(devices, saves=20)
    assert TRAINING not in devices.waits[4:], "in the first save memory is not locked yet when `save` returns"
    assert len(devices.locks) == 2  # of the model's file and the rank's
    assert devices.unlocks == 2


def test_page_locked_bytes_are_the_same_after_two_hundred_saves(devices: SimulatedDevices) -> None:
    place, training = MemoryStorage(), Training(devices, numel=3_000)
    held: list[tuple[int, int, int]] = []
    with sc.CheckpointManager(place, sc.Gangs.local(), keep=sc.KeepLast(2), timeout=LIMIT) as checkpoints:
        for step in range(1, 201):
            training.step()
            checkpoints.save(step, training.state).result()
            locked = sum(stager.locked_nbytes for stager in checkpoints._saver._flights._stagers)
            held.append((locked, len(devices.locks), devices.unlocks))
    locked, locks, unlocks = held[2]
    assert set(held[2:]) == {(locked, locks, unlocks)}
    assert locked == sum(devices.locks) > 0
    assert unlocks == 0


def test_what_training_waited_for_in_the_first_save_is_only_what_was_copied_at_once(devices: SimulatedDevices) -> None:
    place, training = MemoryStorage(), Training(devices)
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        training.save(checkpoints, 1)
        assert devices.waits.count(TRAINING) <= 2
        training.step()
        checkpoints.wait()
        assert checkpoints._saver._flights._stagers[0].locked_nbytes == sum(devices.locks)
    training.check(place)


def test_guard_is_for_devices_too(devices: SimulatedDevices) -> None:
    place, training = MemoryStorage(), Training(devices)
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in (1, 2, 3):
            training.save(checkpoints, step)
            with checkpoints.guard():
                data = training.net.large.data
                devices.launch(partial(data.fill_, 77))
                devices.launch(partial(data.fill_, training.steps))
            training.step()
    training.check(place)


def test_without_locked_memory_it_is_said_once_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices = use(SimulatedDevices(refusal="there is no room"), monkeypatch)
    with caplog.at_level(logging.WARNING):
        train(devices)
    texts = [record.getMessage() for record in caplog.records if "page-locked" in record.getMessage()]
    assert len(texts) == 2  # one for each file
    assert "there is no room" in texts[0]
    assert "three times as long" in texts[0]
    assert "more memory" in texts[0]


def test_memory_that_grows_is_locked_anew_and_the_old_is_unlocked(devices: SimulatedDevices) -> None:
    place = MemoryStorage()
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step, numel in ((1, 100), (2, 100_000), (3, 2_000_000)):
            training = Training(devices, numel=numel)
            training.step()
            training.save(checkpoints, step).result(LIMIT)
            training.step()
            training.check(place)
        assert len(devices.locks) - devices.unlocks == 2
    assert len(devices.locks) == devices.unlocks > 2


def test_memory_is_unlocked_after_the_copies_into_it_and_while_it_is_mapped(devices: SimulatedDevices) -> None:
    """Also when nobody gives it back: a device would write to memory that belongs to somebody else."""
    source = devices.put(torch.ones(100))
    for released in (True, False):
        image = Image()
        image.reserve(4096)
        image.lock(devices, "gpu 0")
        after = devices.mark("gpu 0")
        target = image.tensor(0, torch.float32, (100,))
        image.expect(devices.copy("gpu 0", after, [target], [source]))
        before = devices.unlocks
        if released:
            image.release()
        del image
        assert devices.unlocks == before + 1
        assert target.sum() == 100


def test_two_ranks_write_one_file_of_what_lies_on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rank writes is not copied on the host, but it is compared all the same."""
    contents = []
    for on_devices in (True, False):
        devices, place = use(SimulatedDevices(seed=5), monkeypatch), MemoryStorage()

        def act(gangs: sc.Gangs, devices: Any = devices, place: Any = place, used: bool = on_devices) -> None:
            weights = {name: torch.arange(1_000_000.0) * n for n, name in enumerate(("a", "b", "c"), 1)}
            for weight in weights.values():
                if used:
                    devices.put(weight)
            with sc.CheckpointManager(place, gangs, timeout=LIMIT) as checkpoints:
                for step in (1, 2):
                    checkpoints.save(step, {"model": weights}, replicated=("model",)).result(LIMIT)
                weights["b"][gangs.root.rank] += 1
                with pytest.raises(sc.CheckpointSaveError, match=r"model\.b|differ"):
                    checkpoints.save(3, {"model": weights}, replicated=("model",)).result(LIMIT)

        run_ranks(2, act)
        contents.append([place.read(f"step_{step}/model.pt") for step in (1, 2)])
        assert bool(devices.locks) == on_devices
    assert contents[0] == contents[1]


@pytest.fixture
def stager(devices: SimulatedDevices) -> Iterator[Stager]:
    stager = Stager(devices=devices)
    yield stager
    stager.close()
    assert devices.unlocks == len(devices.locks)


@pytest.mark.parametrize("refusal", [None, "no"])
def test_what_another_rank_writes_in_its_own_file_is_summed_up(
    devices: SimulatedDevices, stager: Stager, refusal: str | None
) -> None:
    """As replicas of a shard (HSDP) do; the host's tensors beside those of devices."""
    devices.refusal = refusal
    tensors = {"first": torch.zeros(LARGE), "here": torch.ones(7), "second": torch.zeros(9), "none": torch.zeros(0)}
    for name in ("first", "second"):
        devices.put(tensors[name])
        devices.launch(partial(tensors[name].add_, 3))
    plan = SavePlan((), (), (), Table((0,), {}, {}), {}, {"group": tuple(tensors.items())})
    for _ in range(2):
        staging = stager.prepare(plan, rank=0)
        staging.copy_later(lambda tensor: True, on_queued=staging.hold)
        for name in ("first", "second"):
            devices.launch(partial(tensors[name].add_, 1))
            devices.launch(partial(tensors[name].sub_, 1))
        staging.seal()
        expected = {name: torch.full_like(value, 3.0) for name, value in tensors.items()} | {"here": tensors["here"]}
        assert staging.alike()["group"] == {
            name: digest_of(value.dtype, tuple(value.shape), crc_of(value)) for name, value in expected.items()
        }
        staging.let_go()
    assert len(devices.locks) == (refusal is None)
