"""The three ways to stage: their bytes, their memory, and what is noticed when the state changes meanwhile."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.saving import stage
from shardckpt.engine.saving.stage import Staging
from shardckpt.engine.saving.staging import imaged
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.transfer.several import for_each
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.gangs import run_ranks
from tests.engine.states import train, training

LIMIT = timedelta(seconds=30)
MODES = ("overlap", "blocking", "none")


def strange() -> dict[str, Any]:
    """Tensors of all kinds of sizes, strides and dtypes; some larger than a window, one larger than a slice."""
    stream = torch.Generator().manual_seed(1)
    large = torch.randn(3 << 20, generator=stream)
    base = torch.randn(700, 900, generator=stream)
    model = {
        "large": large,
        "turned": base.t(),
        "every other": base[::2, 1:],
        "tied": large,
        "scalar": torch.tensor(3.5),
        "none of it": torch.empty(0, 4),
        "half": torch.randn(1000, generator=stream).bfloat16(),
        "conj": torch.randn(300, 300, dtype=torch.complex64, generator=stream).conj().t(),
        "flags": torch.randint(0, 2, (70_001,), generator=stream).bool(),
        "odd": torch.randn(1 << 20, generator=stream)[1:],
    }
    many = {str(i): torch.full((i % 7 + 1,), float(i)) for i in range(200)}
    return {"model": model, "many": many, "values": {"a": [1, 2], "b": "text"}}


def save(place: Storage, mode: Any, state: Callable[[int], dict[str, Any]], *, ranks: int, tp: int = 1) -> None:
    def act(gangs: sc.Gangs) -> None:
        policy = sc.SavePolicy(staging=mode)
        with sc.CheckpointManager(place, gangs, saving=policy, timeout=LIMIT) as checkpoints:
            pending = checkpoints.save(1, state(gangs.root.rank), replicated=("model", "many"))
            assert pending.done() or mode != "none"
            pending.result(LIMIT)

    run_ranks(ranks, act, tp=tp)


def content(place: Storage, folder: str = "step_1") -> dict[str, Any]:
    """Everything but who made it when."""
    found: dict[str, Any] = {}
    for name in place.list(folder):
        if name.endswith("/"):  # of an object store
            found |= content(place, f"{folder}/{name[:-1]}")
        elif name == "manifest.json":
            record = json.loads(place.read(f"{folder}/{name}"))
            attempt = record.pop("attempt")
            del record["created"], record["sha256"]
            found[name] = json.dumps(record).replace(attempt, "")
        else:
            found[name] = place.read(f"{folder}/{name}")
    return found


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (3, 1), (2, 2)])
def test_the_bytes_are_the_same_in_all_modes(kind: Callable[[], Storage], ranks: int, tp: int) -> None:
    """Also where ranks share a file: of a tensor at a border each writes a part."""
    places = {mode: kind() for mode in MODES}
    for mode, place in places.items():
        save(place, mode, lambda rank: {**strange(), "own": torch.full((9,), rank)}, ranks=ranks, tp=tp)
    contents = [content(place) for place in places.values()]
    assert contents[0] == contents[1] == contents[2]
    assert sum(name.startswith("rank_") for name in contents[0]) == ranks


@pytest.mark.parametrize("mode", MODES)
def test_a_training_state_comes_back(tmp_path: Path, mode: Any) -> None:
    state = training()
    train(state, 2)
    with sc.CheckpointManager(tmp_path, saving=sc.SavePolicy(staging=mode, verify_copies=True)) as checkpoints:
        checkpoints.save(2, state)
        expected = train(state, 2)
    other = training(seed=5)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.resume(other) is not None
    assert train(other, 2) == expected


def peak_nbytes() -> int:
    """The most memory that this process has held since `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_nbytes()


def test_without_staging_no_copy_of_the_state_is_held(tmp_path: Path) -> None:
    """Whatever it is: in place, strided, or many. The promise is 256 MiB; it takes about 20."""
    base = torch.zeros(6000, 6000)  # 144 MB
    state = {"plain": base, "turned": base.t(), "many": {str(i): torch.ones(64) for i in range(2000)}}
    most = {}
    for mode in ("none", "blocking"):
        with sc.CheckpointManager(tmp_path / mode, saving=sc.SavePolicy(staging=mode)) as checkpoints:  # type: ignore[arg-type]
            checkpoints.save(1, {"small": torch.ones(1)}).result(LIMIT)
            before = forget_peak()
            info = checkpoints.save(2, state).result(LIMIT)
            most[mode] = peak_nbytes() - before
    assert info.nbytes > 280e6
    assert most["none"] < 64 << 20
    assert most["blocking"] > 200 << 20, "else this measures nothing"


class Meddling(StorageWrapper):
    """Does something once, when so many parts of a file have been taken."""

    def __init__(self, inner: Storage, act: Callable[[], None], *, after: int = 1) -> None:
        super().__init__(inner)
        self._act, self._after = act, after

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return super().put(key, self._watched(parts) if key.endswith(".pt") else parts)

    def _watched(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for number, part in enumerate(parts):
            if number == self._after:
                self._act()
            yield part


def test_without_staging_a_change_meanwhile_is_noticed() -> None:
    state = {"first": torch.zeros(1 << 20), "second": torch.zeros(1 << 20), "third": torch.ones(9)}
    place = MemoryStorage()
    meddling = Meddling(place, lambda: state["second"][-1:].fill_(1.0))
    with sc.CheckpointManager(meddling, saving=sc.SavePolicy(staging="none"), timeout=LIMIT) as checkpoints:
        pending = checkpoints.save(1, {"s": state})
        assert pending.done()
        with pytest.raises(sc.CheckpointSaveError, match=r"changed .*: s\.second\. .*guard\(\)"):
            pending.result()
        checkpoints.save(1, {"s": state}).result()  # from now on it lies still
        assert checkpoints.steps() == [1]
    assert place.list() == ["step_1/"]


@pytest.mark.timeout(60)
def test_who_interrupts_a_save_without_staging_gets_no_checkpoint_of_what_comes_after() -> None:
    """Ctrl-C leaves `save` while the state is being written from where it lies; it is told to stop."""
    state = {"w": torch.zeros(8 << 20)}
    place, passed = MemoryStorage(), threading.Event()

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert passed.wait(20)

    meddling = Meddling(place, interrupt)
    with sc.CheckpointManager(meddling, saving=sc.SavePolicy(staging="none"), timeout=LIMIT) as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, state)
        passed.set()
        with pytest.raises(sc.CheckpointSaveError, match="cancelled"):
            checkpoints.wait()
        assert checkpoints.steps() == []


class Held:
    """The copy of parameters begins when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        real = Staging.copy

        def copy(staging: Staging, wanted: Callable[[torch.Tensor], bool]) -> None:
            if threading.current_thread().name == "shardckpt-copy":
                assert self.gate.wait(20)
            real(staging, wanted)

        monkeypatch.setattr(Staging, "copy", copy)


@pytest.mark.parametrize("guarded", [False, True])
def test_the_check_of_copies_names_what_was_changed_without_guard(
    monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    held, state = Held(monkeypatch), training()
    train(state, 1)
    saving = sc.SavePolicy(verify_copies=True)
    with sc.CheckpointManager(MemoryStorage(), saving=saving, timeout=LIMIT) as checkpoints:
        pending = checkpoints.save(1, state)
        if guarded:
            held.gate.set()
            with checkpoints.guard():
                state["model"].body.bias.data.add_(1.0)
            pending.result(LIMIT)
        else:
            state["model"].body.bias.data.add_(1.0)
            state["model"].head.weight.data[3, 5] += 1.0
            held.gate.set()
            with pytest.raises(sc.CheckpointSaveError, match=r"guard\(\)") as caught:
                pending.result(LIMIT)
            changed = str(caught.value).partition("writing: ")[2].partition(". ")[0]
            assert set(changed.split(", ")) == {"model.body.bias", "model.head.weight", "model.embed.weight"}
        checkpoints.save(2, state).result(LIMIT)
        assert checkpoints.steps() == ([1, 2] if guarded else [2])


def test_the_check_of_copies_finds_an_image_that_was_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever: the copy is compared with what was there, not with itself."""
    real = Staging.copy

    def copy(staging: Staging, wanted: Callable[[torch.Tensor], bool]) -> None:
        real(staging, wanted)
        for staged in staging._stages:
            image: Any = staged
            image.image.view[image._layout.slots[0].data] = 1  # of 1.0 it is 0

    with sc.CheckpointManager(
        LocalStorage(tmp_path), saving=sc.SavePolicy(staging="blocking", verify_copies=True)
    ) as checkpoints:
        monkeypatch.setattr(Staging, "copy", copy)
        with pytest.raises(sc.CheckpointSaveError, match=r"changed .*: w\. "):
            checkpoints.save(1, {"w": torch.ones(5)}).result(LIMIT)
        monkeypatch.setattr(Staging, "copy", real)
        checkpoints.save(1, {"w": torch.ones(5)}).result(LIMIT)


@pytest.mark.parametrize(
    "wrong", [{"staging": "sometimes"}, {"when_busy": "cry"}, {"in_flight": 0}], ids=lambda each: next(iter(each))
)
def test_a_policy_that_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        sc.SavePolicy(**wrong)


def test_tensors_of_medium_size_are_handed_to_threads_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA adapters are some hundred tensors of 100 KB; handing over each cost twice as much as copying it."""
    jobs: list[int] = []

    def counted(items: Iterable[Any], work: Callable[[Any], None], *, threads: int) -> None:
        jobs.append(len(every := list(items)))
        for_each(every, work, threads=threads)

    monkeypatch.setattr(stage, "for_each", counted)
    monkeypatch.setattr(imaged, "for_each", counted)
    state = {f"{n}": torch.randn(128, 256) for n in range(200)} | {"small": torch.ones(3), "large": torch.ones(2 << 20)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        for tensor in state.values():
            tensor.zero_()
        checkpoints.load(1, state)
    assert jobs, "nothing was counted"
    assert max(jobs) <= 10, "26 MB in pieces of 4 MiB, and one each for the large and the small one"
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
