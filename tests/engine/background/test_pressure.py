"""A save that comes while others are under way; saves that are cancelled, or given a deadline. On all ranks alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.pending import PendingSave
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from shardckpt.testing.gangs import run_ranks

LIMIT = timedelta(seconds=30)
LIMIT_S = LIMIT.total_seconds()
RANKS = 3


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {"w": torch.full((50_000,), float(100 * rank + step)), "step": step}


def loads(checkpoints: sc.CheckpointManager, rank: int) -> list[int]:
    """The committed steps; each holds what was there at its save."""
    steps = checkpoints.steps()
    for step in steps:
        state = state_of(rank, 77)
        checkpoints.load(step, state)
        assert torch.equal(state["w"], state_of(rank, step)["w"])
        assert state["step"] == step
    return steps


@dataclass
class Gates:
    """Storages, one for each rank, in which the writing of given steps waits."""

    place: Storage
    steps: tuple[int, ...]
    storages: list[GatedStorage] = field(default_factory=list)

    def __post_init__(self) -> None:
        def held(operation: Any) -> bool:
            return operation.name == "put" and any(f"step_{step}" in operation.key for step in self.steps)

        self.storages = [GatedStorage(self.place, lambda op: held(op) and ".pt" in op.key) for _ in range(RANKS)]


def on_ranks(
    storage: Callable[[int], Storage],
    saving: sc.SavePolicy,
    act: Callable[[sc.CheckpointManager, int], Any],
    *,
    ranks: int = RANKS,
    **options: Any,
) -> list[Any]:
    def run(gangs: sc.Gangs) -> Any:
        rank = gangs.root.rank
        with sc.CheckpointManager(storage(rank), gangs, saving=saving, timeout=LIMIT, **options) as checkpoints:
            return act(checkpoints, rank)

    return run_ranks(ranks, run)


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_what_comes_while_another_is_under_way_is_skipped(kind: Callable[[], Storage]) -> None:
    gates = Gates(kind(), (1,))

    def act(checkpoints: sc.CheckpointManager, rank: int) -> Any:
        pending = [checkpoints.save(1, state_of(rank, 1))]
        assert gates.storages[rank].reached.wait(LIMIT_S)
        pending += [checkpoints.save(step, state_of(rank, step)) for step in (2, 3)]
        assert not any(each.done() for each in pending), "to skip waits for nobody"
        gates.storages[rank].open_gate()
        checkpoints.wait()  # what was skipped is no failure
        for each in pending[1:]:
            with pytest.raises(
                sc.CheckpointSkippedError, match=r"was skipped: step 1.* is still being saved"
            ) as caught:
                each.result()
            assert caught.value.step == each.step
        checkpoints.save(4, state_of(rank, 4)).result()
        return [each.skipped for each in pending], checkpoints.skipped, loads(checkpoints, rank)

    results = on_ranks(gates.storages.__getitem__, sc.SavePolicy(when_busy="skip"), act)
    assert results == [([False, True, True], 2, [1, 4])] * RANKS


def test_ranks_that_see_it_differently_skip_all_the_same() -> None:
    """Rank 1 has not heard of the commit of step 1 when it comes to step 2; the others have, and stage step 2."""
    place, heard = MemoryStorage(), threading.Event()

    def act(checkpoints: sc.CheckpointManager, rank: int) -> Any:
        if rank == 1:
            finish = sc.PendingSave.finish

            def late(pending: Any, info: Any) -> None:
                assert heard.wait(LIMIT_S)
                finish(pending, info)

            first = checkpoints.save(1, state_of(rank, 1))
            first.finish = lambda info: late(first, info)  # type: ignore[method-assign]
        else:
            first = checkpoints.save(1, state_of(rank, 1))
            first.result(LIMIT)
        second = checkpoints.save(2, state_of(rank, 2))
        if rank == 1:
            heard.set()
        checkpoints.wait()
        checkpoints.save(3, state_of(rank, 3)).result()
        return first.skipped, second.skipped, checkpoints.skipped, loads(checkpoints, rank)

    assert on_ranks(lambda rank: place, sc.SavePolicy(when_busy="skip"), act) == [(False, True, 1, [1, 3])] * RANKS


def test_what_is_not_committed_is_given_up_for_a_newer_one() -> None:
    first, second = Gates(MemoryStorage(), (1,)), Gates(MemoryStorage(), (2,))
    place = MemoryStorage()
    for outer, inner in zip(first.storages, second.storages, strict=True):
        outer.inner, inner.inner = inner, place

    def act(checkpoints: sc.CheckpointManager, rank: int) -> Any:
        checkpoints.save(0, state_of(rank, 0)).result()
        pending = [checkpoints.save(1, state_of(rank, 1))]
        assert first.storages[rank].reached.wait(LIMIT_S)
        pending.append(checkpoints.save(2, state_of(rank, 2)))
        assert not pending[0].done(), "the new one is staged before the old one has come to its end"
        first.storages[rank].open_gate()
        pending.append(checkpoints.save(3, state_of(rank, 3)))
        assert pending[0].done(), "there is memory for one more, not for two"
        second.storages[rank].open_gate()
        checkpoints.wait()
        with pytest.raises(sc.CheckpointSkippedError, match="step 2 was given up for step 3"):
            pending[1].result()
        return [each.skipped for each in pending], checkpoints.skipped, loads(checkpoints, rank)

    results = on_ranks(first.storages.__getitem__, sc.SavePolicy(when_busy="replace"), act)
    assert results == [([True, True, False], 2, [0, 3])] * RANKS


class Parts(StorageWrapper):
    """Of one file: tells when its first part has been taken, and takes the second when it is let."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.begun, self.gate = threading.Event(), threading.Event()
        self.taken = 0

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return super().put(key, self._watched(parts) if "step_1" in key and key.endswith(".pt") else parts)

    def _watched(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for part in parts:
            self.taken += 1
            yield part
            self.begun.set()
            assert self.gate.wait(LIMIT_S)


def test_who_is_interrupted_while_waiting_for_room_saves_nothing_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not leave the other ranks waiting: the save that was to come fails, with that as the reason."""
    gates, real = Gates(MemoryStorage(), (1,)), PendingSave.wait
    main = threading.main_thread().ident or 0
    interrupter = threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGINT))

    def wait(pending: PendingSave) -> None:
        if not interrupter.ident:
            interrupter.start()
        real(pending)

    with sc.CheckpointManager(gates.storages[0], sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        checkpoints.save(1, state_of(0, 1))
        assert gates.storages[0].reached.wait(LIMIT_S)
        monkeypatch.setattr(PendingSave, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state_of(0, 2))
        interrupter.join()
        gates.storages[0].open_gate()
        last = checkpoints._saver.last
        assert last is not None
        with pytest.raises(sc.CheckpointSaveError, match=r"step 2 was not saved: .*KeyboardInterrupt"):
            last.result(LIMIT)
        checkpoints.save(3, state_of(0, 3)).result(LIMIT)
        assert loads(checkpoints, 0) == [1, 3]


@pytest.mark.parametrize("by", ["cancel", "replace"])
def test_a_file_is_given_up_in_the_middle(by: str) -> None:
    """Not when it is written: of three pieces of a large file one is taken."""
    place = MemoryStorage()
    parts = Parts(place)
    large = {"w": torch.zeros(24 << 20, dtype=torch.int32)}

    def act(checkpoints: sc.CheckpointManager, rank: int) -> None:
        first = checkpoints.save(1, large)
        assert parts.begun.wait(LIMIT_S)
        if by == "cancel":
            first.cancel()
        second = checkpoints.save(2, {"w": torch.zeros(3)}) if by == "replace" else None
        parts.gate.set()
        with pytest.raises(sc.CheckpointSaveError, match="cancelled" if by == "cancel" else "given up for step 2"):
            first.result(LIMIT)
        assert first.skipped == (by == "replace")
        (second or checkpoints.save(2, {"w": torch.zeros(3)})).result(LIMIT)
        assert checkpoints.steps() == [2]

    on_ranks(lambda rank: parts, sc.SavePolicy(when_busy="replace"), act, ranks=1)
    assert parts.taken == 1
    assert place.list() == ["step_2/"]


def test_as_many_as_are_allowed_are_under_way_each_with_its_own_copy() -> None:
    gates = Gates(MemoryStorage(), (1, 2, 3))

    def act(checkpoints: sc.CheckpointManager, rank: int) -> Any:
        state, third = state_of(rank, 1), threading.Event()
        first = checkpoints.save(1, state)
        assert gates.storages[rank].reached.wait(LIMIT_S)
        state["w"].add_(1.0)
        state["step"] = 2
        second = checkpoints.save(2, state)  # does not wait, and takes nothing from the first
        assert second.staged(LIMIT)
        assert not first.done()
        state["w"].add_(1.0)
        state["step"] = 3
        opener = threading.Thread(target=lambda: third.wait(0.2) or gates.storages[rank].open_gate())
        opener.start()
        checkpoints.save(3, state)  # for this one the first had to end
        third.set()
        assert first.done()
        opener.join()
        checkpoints.wait()
        return checkpoints.skipped, loads(checkpoints, rank), len(checkpoints._saver._flights._stagers)

    assert on_ranks(gates.storages.__getitem__, sc.SavePolicy(in_flight=2), act) == [(0, [1, 2, 3], 2)] * RANKS


@pytest.mark.parametrize("in_flight", [1, 2])
def test_failures_in_a_row_are_raised_on_all_ranks_at_the_same_save(in_flight: int) -> None:
    """With two in flight, what has failed is certain one save later."""
    place, healthy, met = MemoryStorage(), threading.Event(), threading.Barrier(RANKS)
    sick: Callable[[Any], bool] = lambda op: not healthy.is_set() and on("put", key="rank_2")(op)  # noqa: E731
    storages = [FailingStorage(place, sick, times=None, error=lambda: OSError(28, "full")) for _ in range(RANKS)]

    def act(checkpoints: sc.CheckpointManager, rank: int) -> tuple[int, list[int]]:
        raised = 0
        for step in range(1, 9):
            try:
                checkpoints.save(step, state_of(rank, step))
            except sc.CheckpointSaveError:
                raised = step
                break
        with pytest.raises(sc.CheckpointSaveError, match="full") if in_flight == 2 else nullcontext():
            checkpoints.wait()  # the one that was under way then
        met.wait(LIMIT_S)
        healthy.set()
        checkpoints.save(20, state_of(rank, 20)).result(LIMIT)
        return raised, checkpoints.steps()

    results = on_ranks(storages.__getitem__, sc.SavePolicy(in_flight=in_flight), act, tolerate=1)
    assert results == [(2 + in_flight, [20])] * RANKS


@pytest.mark.parametrize("phase", ["make_folder", "put"])
def test_a_save_is_given_a_deadline(phase: str) -> None:
    """However patient the manager is; all ranks hear of it, and the next save is not concerned."""
    place = MemoryStorage()
    gated = GatedStorage(place, on(phase, key="rank_1" if phase == "put" else "step_1"))
    slow = 0 if phase == "make_folder" else 1

    def act(checkpoints: sc.CheckpointManager, rank: int) -> list[int]:
        pending = checkpoints.save(1, state_of(rank, 1), deadline=timedelta(seconds=0.3))
        with pytest.raises(sc.CheckpointSaveError, match=f"rank {slow}: TimeoutError"):
            pending.result(timedelta(seconds=10))
        if rank == slow:
            gated.open_gate()
        checkpoints.save(1, state_of(rank, 1), deadline=LIMIT).result()
        return loads(checkpoints, rank)

    assert on_ranks(lambda rank: gated if rank == slow else place, sc.SavePolicy(), act) == [[1]] * RANKS


def test_a_deadline_that_has_passed_in_the_queue() -> None:
    gates = Gates(MemoryStorage(), (1,))

    def act(checkpoints: sc.CheckpointManager, rank: int) -> list[int]:
        first = checkpoints.save(1, state_of(rank, 1))
        assert gates.storages[rank].reached.wait(LIMIT_S)
        second = checkpoints.save(2, state_of(rank, 2), deadline=timedelta(0))
        gates.storages[rank].open_gate()
        with pytest.raises(sc.CheckpointSaveError, match="deadline"):
            second.result(LIMIT)
        first.result(LIMIT)
        return loads(checkpoints, rank)

    assert on_ranks(gates.storages.__getitem__, sc.SavePolicy(in_flight=2), act) == [[1]] * RANKS
