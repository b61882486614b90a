"""`ResumableSampler`: no sample is lost and none comes twice, whatever becomes of the job; and torchdata's loader."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import shardckpt as sc
from tests.manager.transactions import Size, on_ranks


class OfRank:
    """Gangs of one data-parallel rank, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.dp = self
        self.rank, self.size = rank, size


def samplers(count: int, ranks: int, **terms: Any) -> list[sc.ResumableSampler]:
    return [sc.ResumableSampler(range(count), OfRank(rank, ranks), **terms) for rank in range(ranks)]


def take(sampler: sc.ResumableSampler, batches: int | None = None, *, batch_size: int = 2) -> list[int]:
    """So many batches, or all that are left of the epoch."""
    over = sampler.over(DataLoader(range(sampler._count), batch_size=batch_size, sampler=sampler))
    return [number for batch in itertools.islice(over, batches) for number in batch.tolist()]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_its_order_is_that_of_torch(shuffle: bool, drop_last: bool) -> None:
    for rank, sampler in enumerate(samplers(11, 4, shuffle=shuffle, seed=5, drop_last=drop_last)):
        theirs: DistributedSampler[int] = DistributedSampler(
            range(11), 4, rank, shuffle=shuffle, seed=5, drop_last=drop_last
        )
        for epoch in range(3):
            theirs.set_epoch(epoch)
            assert sampler.epoch == epoch
            assert take(sampler) == list(theirs)


@given(
    count=st.integers(1, 60),
    jobs=st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 6), min_size=5, max_size=5)), max_size=4),
    last=st.integers(1, 5),
    drop_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_becomes_of_the_job_each_sample_comes_once(
    count: int, jobs: list[tuple[int, list[int]]], last: int, drop_last: bool
) -> None:
    """Jobs of other sizes, whose ranks took so many batches each; the last one goes to the end of the epoch."""
    seen: Counter[int] = Counter()
    saved: list[dict[str, Any]] = []
    for ranks, batches in [*jobs, (last, None)]:
        job = samplers(count, ranks, seed=1, drop_last=drop_last)
        if saved:
            for rank, sampler in enumerate(job):
                same = len(saved) == ranks
                sampler.load_state_dict(saved[rank] if same else sampler.new_world(saved, rank, ranks))
        left = [len(sampler) for sampler in job]
        assert batches is not None or len(saved) == ranks or len(set(left)) == 1, "all ranks have as many"
        for rank, sampler in enumerate(job):
            order = iter(sampler)
            took = [next(order) for _ in range(left[rank] if batches is None else min(left[rank], 2 * batches[rank]))]
            sampler._taken += len(took)
            seen.update(took)
        saved = [sampler.state_dict() for sampler in job]
    assert set(seen) <= set(range(count))
    if drop_last:
        assert all(times == 1 for times in seen.values())
        assert count - len(seen) < last + sum(ranks for ranks, _ in jobs)
    else:
        assert set(seen) == set(range(count)), "none is lost"
        assert sum(seen.values()) - count < last + sum(ranks for ranks, _ in jobs), "only the ends are filled up"


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_what_a_loader_has_fetched_in_advance_does_not_count(kind: Any) -> None:
    """Nor does it matter where in the epoch its workers began; and the training's random numbers are left alone."""
    (whole,), (sampler,), (again,) = (samplers(20, 1, seed=3) for _ in range(3))
    expected = take(whole, batch_size=4)
    loader = kind(range(20), batch_size=4, sampler=sampler, num_workers=1, multiprocessing_context="fork")
    torch.manual_seed(7)
    over = sampler.over(loader)
    first = [next(over).tolist() for _ in range(2)]
    drawn = torch.rand(1)
    state = sampler.state_dict()
    over.close()
    assert state["taken"] == 8
    again.load_state_dict(state)
    torch.manual_seed(7)
    rest = again.over(kind(range(20), batch_size=4, sampler=again))
    third = next(rest).tolist()
    assert torch.equal(drawn, torch.rand(1))
    assert [*itertools.chain(*first), *third, *(number for batch in rest for number in batch.tolist())] == expected
    assert (again.epoch, len(again)) == (1, 20)


def test_saved_by_two_and_gone_on_with_by_three(tmp_path: Path) -> None:
    """Through a checkpoint, without a word about it in the load."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> list[int]:
        sampler = sc.ResumableSampler(range(30), gangs, seed=2)
        if manager.resume({"data": sampler}) is not None:
            return take(sampler)
        taken = take(sampler, 3 + gangs.dp.rank)  # one is ahead of the other
        manager.save(1, {"data": sampler}).result()
        return taken

    begun = on_ranks(Size(2), tmp_path, act)
    assert [len(taken) for taken in begun] == [6, 8]
    rest = on_ranks(Size(3), tmp_path, act)
    assert [len(taken) for taken in rest] == [6, 6, 6]
    seen = Counter(number for taken in begun + rest for number in taken)
    assert set(seen) == set(range(30))
    assert sum(seen.values()) == 32, "16 that were left, for three ranks with as many each"


def test_a_position_in_another_order_means_nothing(tmp_path: Path) -> None:
    (sampler,), (longer,), (other,) = samplers(10, 1), samplers(11, 1), samplers(10, 1, seed=1)
    for wrong in (longer, other):
        with pytest.raises(ValueError, match=r"and are now .* a position in them means nothing"):
            wrong.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match=r"different epochs: \[0, 1\]"):
        sampler.new_world([sampler.state_dict(), {**sampler.state_dict(), "epoch": 1}], 0, 3)


def test_a_loader_that_takes_another_sampler_is_refused() -> None:
    ((sampler,),) = (samplers(10, 1),)
    by_two = BatchSampler(SequentialSampler(range(10)), 2, False)
    loaders: list[DataLoader[int]] = [DataLoader(range(10)), DataLoader(range(10), batch_sampler=by_two)]
    for loader in [*loaders, DataLoader(range(10), None)]:
        with pytest.raises(ValueError, match="this sampler, and a batch_size"):
            next(sampler.over(loader))
    with_its_own: DataLoader[int] = DataLoader(range(10), batch_sampler=BatchSampler(sampler, 4, True))
    assert [len(batch) for batch in sampler.over(with_its_own)] == [4, 4]
    assert sampler.epoch == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_of_torchdata_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    """As it is, in the state; by each rank of as many as there were."""

    def loader() -> StatefulDataLoader:
        terms = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        return StatefulDataLoader(range(24), 3, shuffle=True, generator=torch.Generator().manual_seed(4), **terms)

    expected = [batch.tolist() for batch in loader()]
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as checkpoints:
        data = loader()
        batches = iter(data)
        begun = [next(batches).tolist() for _ in range(3)]
        checkpoints.save(1, {"data": data}).result()
        del batches
        data = loader()
        assert checkpoints.resume({"data": data}) is not None
        assert begun + [batch.tolist() for batch in data] == expected


def test_streams_of_devices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RngState` has put them back, and dropout goes on with them: a loader that begins must not set them anew."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    torch.manual_seed(1)
    assert seeded, "torch would do so through this"
    seeded.clear()
    before = torch.get_rng_state()
    sampler = sc.ResumableSampler(range(8), sc.Gangs.local())
    assert sum(map(len, sampler.over(DataLoader(range(8), 2, sampler=sampler)))) == 8
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)
