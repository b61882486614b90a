"""A sampler that knows which samples training has had: it goes on with the rest, also on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from shardckpt.gang.gangs import Gangs
from shardckpt.state import Merge


class ResumableSampler(Sampler[int]):
    """In place of `DistributedSampler`, with its order of samples: data-parallel rank r of n has every n-th of them.

        sampler = sc.ResumableSampler(dataset, gangs)
        loader = DataLoader(dataset, batch_size=8, sampler=sampler)  # or torchdata's StatefulDataLoader
        state = {"model": model, "optimizer": optimizer, "data": sampler, "rng": sc.RngState()}
        checkpoints.resume(state)
        for epoch in range(sampler.epoch, 10):
            for batch in sampler.over(loader):  # what is left of this epoch
                ...

    It is in the state, and the loader is not. What counts are the samples of batches that training was given, not those
    that a loader has fetched in advance. On another number of data-parallel ranks the epoch goes on with the samples
    that none of the ranks before has had, also where some of these were ahead of others: none is lost, and none comes
    twice but those that fill up the end of an epoch. Used on every rank, on the training's thread.

    Random numbers that a data set draws in the training's process come back with `RngState`. Those drawn in workers of
    a loader begin anew in the middle of an epoch, as they do with torchdata.

    Args:
        dataset: anything that has a length, the same in each job.
        gangs: of the job; its data-parallel rank and size count. Found from the environment if not given.
        shuffle: another order in each epoch, by `seed`; else as they lie.
        drop_last: at the end of an epoch, leave out what does not go round, where otherwise some samples are taken
            again: all ranks have the same number of samples in any case.
    """

    def __init__(
        self,
        dataset: Sized,
        gangs: Gangs | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        dp = (gangs or Gangs.from_env()).dp
        self._rank, self._ranks = dp.rank, dp.size
        self._count, self._shuffle, self._seed, self._drop_last = len(dataset), shuffle, seed, drop_last
        self.epoch = 0
        """Epochs that are done."""
        self._taken = 0
        self._jobs: list[list[int]] = []
        """Of each job before this one in this epoch, how many samples each of its data-parallel ranks took."""

    def over(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The batches of the loader that are left of this epoch; each counts as soon as it is given. Then the epoch is
        over. `ValueError` if the loader does not take this sampler in batches of one size."""
        batch_size = self._batch_size(loader)
        # A loader draws a seed for its workers, in the middle of an epoch or not. `torch.manual_seed` would set the
        # streams of devices as well, which nothing here puts back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self._seed, self.epoch, self._rank)) % (1 << 63))
            batches, left = iter(loader), len(self)
        for batch in batches:
            took = min(batch_size, left)
            self._taken, left = self._taken + took, left - took
            yield batch
        self.epoch, self._taken, self._jobs = self.epoch + 1, 0, []

    def _batch_size(self, loader: DataLoader[Any]) -> int:
        batches = loader.batch_sampler
        if not isinstance(batches, BatchSampler) or batches.sampler is not self:
            raise ValueError("give `over` a DataLoader with sampler=, this sampler, and a batch_size")
        return batches.batch_size

    def __iter__(self) -> Iterator[int]:
        return iter(self._rest().tolist())

    def __len__(self) -> int:
        return len(self._rest())

    def _rest(self) -> torch.Tensor:
        """What this rank is still to have of this epoch."""
        left, ranks = self._order(), self._ranks
        for took in self._jobs:
            place = torch.arange(len(left))
            left = left[place // len(took) >= torch.tensor(took)[place % len(took)]]
        whole = len(left) // ranks * ranks
        if whole < len(left):
            filled = left.repeat(-(-ranks // len(left)) + 1)[: whole + ranks]
            left = left[:whole] if self._drop_last else filled
        return left[self._rank :: ranks][self._taken :]

    def _order(self) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._count)
        return torch.randperm(self._count, generator=torch.Generator().manual_seed(self._seed + self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: where it is, and whose order that is in."""
        order = {"count": self._count, "shuffle": self._shuffle, "seed": self._seed}
        return {"order": order, "epoch": self.epoch, "taken": self._taken, "jobs": self._jobs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`ValueError` if the data set, or its order, is not the one of the checkpoint."""
        own = self.state_dict()["order"]
        if state["order"] != own:
            raise ValueError(f"the samples were {state['order']} and are now {own}: a position in them means nothing")
        self.epoch, self._taken, self._jobs = state["epoch"], state["taken"], list(state["jobs"])

    @property
    def new_world(self) -> Merge:
        """Asked for by the load where the number of data-parallel ranks has changed; see `LoadPolicy`."""
        return _left_by


def _left_by(saved: Sequence[Mapping[str, Any]], dp_rank: int, dp_size: int) -> dict[str, Any]:
    """Where each rank is after a job whose ranks left this behind; `ValueError` if they were in different epochs."""
    epochs = {own["epoch"] for own in saved}
    if len(epochs) > 1:
        raise ValueError(f"the ranks were in different epochs: {sorted(epochs)}")
    return {**saved[0], "taken": 0, "jobs": [*saved[0]["jobs"], [own["taken"] for own in saved]]}
