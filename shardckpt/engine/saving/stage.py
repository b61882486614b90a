"""Stage: copy this rank's part of the state to its final place in the images of its files. The snapshot is the file.

`Stager.prepare` runs on the caller's thread and only lays out; the copies of what may change at once run there
too; the copies of parameters and optimizer state run on the copying thread while the next forward and backward run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch

from shardckpt.engine.saving.devices.cuda import Cuda
from shardckpt.engine.saving.devices.seam import Devices, Place
from shardckpt.engine.saving.image import Image
from shardckpt.engine.saving.plan import FilePlan, SavePlan
from shardckpt.engine.saving.staging.alike import Alike
from shardckpt.engine.saving.staging.file import StagedFile, Wanted, changed_error, crc_of, digest_of, nothing
from shardckpt.engine.saving.staging.frozen import FrozenFile
from shardckpt.engine.saving.staging.imaged import ImagedFile
from shardckpt.engine.saving.staging.lane import Lane
from shardckpt.engine.saving.staging.windowed import WindowedFile
from shardckpt.engine.saving.write import Sealed
from shardckpt.format.layout import FROZEN, FROZEN_OF_RANK
from shardckpt.format.manifest import Home
from shardckpt.storage.transfer.several import for_each

_LITTLE = 8 << 20
"""Bytes of an image that may be page-locked whatever is copied to it."""


class Stager:
    """Keeps the images and layouts from save to save. One per manager; used for one save at a time."""

    def __init__(
        self,
        *,
        least_share: int | None = None,
        shared: bool = False,
        threads: int = 2,
        devices: Devices | None = None,
    ) -> None:
        """`least_share`: from how many bytes on several ranks write a file together; None if they cannot. `shared`:
        whether another process writes. `devices`: those of CUDA, if not given."""
        self._shared = shared
        self._slots: dict[Home, ImagedFile] = {}
        self._frozen: dict[Home, FrozenFile] = {}
        self._alike = Alike()
        self._least_share = least_share
        self._threads = threads
        self._devices = devices or Cuda()

    @property
    def nbytes(self) -> int:
        """Host memory held by the images."""
        return sum(image.capacity for image in self._images())

    @property
    def locked_nbytes(self) -> int:
        """How much of it is page-locked."""
        return sum(image.capacity for image in self._images() if image.is_locked)

    def _images(self) -> list[Image]:
        return [*(stage.image for stage in self._slots.values()), self._alike.image]

    def prepare(self, plan: SavePlan, *, rank: int, windowed: bool = False) -> Staging:
        """Lay the files out and have memory for them. Copies nothing yet, but this is the moment whose state it is.

        `windowed`: nothing is to be copied at all; the state does not change until it has been written.
        """
        stages: list[StagedFile] = []
        for file in plan.files:
            stages.append(self._lay_out(file, windowed=windowed))
        lane = Lane(self._devices)
        tensors = [record.tensor for file in plan.files for record in file.records]
        lane.begin(chain(tensors, (tensor for group in plan.alike.values() for _, tensor in group)))
        if windowed:
            lane.settle()
        self._alike.prepare(plan.alike, self._devices)
        return Staging((stages, self._alike, lane, self._devices), plan, rank=rank, threads=self._threads)

    def _lay_out(self, file: FilePlan, *, windowed: bool) -> StagedFile:
        if file.home in (FROZEN, FROZEN_OF_RANK):
            frozen = self._frozen.setdefault(file.home, FrozenFile())
            frozen.lay_out(file, least_share=None)  # one digest over all of it, so one rank puts it
            return frozen
        stage = WindowedFile() if windowed else self._slots.setdefault(file.home, ImagedFile(shared=self._shared))
        stage.lay_out(file, least_share=self._least_share)
        return stage

    def forsake(self) -> None:
        """Have new images next time: a writer that may still wake up holds on to these."""
        self._slots, self._frozen, self._alike = {}, {}, Alike()

    def close(self) -> None:
        """Give the memory back."""
        for image in self._images():
            image.release()
        self._slots, self._frozen, self._alike = {}, {}, Alike()


class Staging:
    """One save's way into the images."""

    def __init__(
        self,
        means: tuple[Sequence[StagedFile], Alike, Lane, Devices],
        plan: SavePlan,
        *,
        rank: int,
        threads: int,
    ) -> None:
        self._stages, self._alike, self._lane, self._devices = means
        self._plan = plan
        self._rank = rank
        self._threads = threads
        self._noted: dict[str, dict[str, str]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes, the tails not counted."""
        return sum(stage.nbytes for stage in self._stages)

    @property
    def led(self) -> list[str]:
        """The files that this rank writes together with others, and of which it writes the end."""
        return [stage.name for stage in self._stages if stage.is_led]

    def note(self) -> None:
        """Sum up all tensors as they are now; `seal` then fails if what was copied later is not that."""
        self._lane.settle()
        jobs = [job for stage in self._stages for job in stage.notes()]
        for_each(jobs, lambda job: job(), threads=self._threads)
        for group, tensors in self._plan.alike.items():
            self._noted[group] = {
                name: digest_of(tensor.dtype, tuple(tensor.shape), crc_of(tensor)) for name, tensor in tensors
            }

    def copy_now(self, wanted: Wanted, *, and_wait: bool) -> None:
        """On training's thread: what it does from now on, also on devices, comes after these copies. `and_wait`: they
        are all, and they are over when it returns."""
        if and_wait:
            self._lock()
        self.copy(wanted)
        self.hold()
        if and_wait:
            self.finish()

    def copy_later(self, wanted: Wanted, *, on_queued: Callable[[], None]) -> None:
        """On another thread. `on_queued` is called when training may go on as soon as it has called `hold`; all is over
        when this returns. It is here that memory is page-locked, in the first save, which no training waits for."""
        self._lock()
        self.copy(wanted)
        on_queued()
        self.finish()

    def copy(self, wanted: Wanted) -> None:
        """Copy the tensors for which `wanted` holds, and sum up those that others write. Of the host's it is done when
        it returns; of those on devices, where memory is page-locked, it is queued."""
        lane, here = self._lane, wanted
        if wanted is nothing:
            return
        if lane.places:

            def here(tensor: torch.Tensor) -> bool:
                return lane.place_of(tensor) is None and wanted(tensor)

        jobs: list[Callable[[], None]] = []
        for stage in self._stages:
            jobs += stage.jobs(here)
        for_each(jobs, lambda job: job(), threads=self._threads)
        for job in self._alike.jobs(here):
            job()
        for place in lane.places:
            self._copy_from(place, lambda tensor, place=place: lane.place_of(tensor) == place and wanted(tensor))  # type: ignore[misc]

    def _copy_from(self, place: Place, wanted: Wanted) -> None:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        jobs: list[Callable[[], None]] = []
        images: list[Image] = []
        for stage in self._all():
            if stage.image is not None and stage.image.is_locked:
                pairs += stage.transfers(wanted)
                images.append(stage.image)
            else:
                jobs += stage.jobs(wanted)
        if pairs:
            end = self._lane.copy(place, pairs)
            for image in images:
                image.expect(end)
        if jobs:
            with self._lane.beside(place):  # which is this thread's only, so there is no crew here
                for job in jobs:
                    job()

    def hold(self) -> None:
        """On the thread that changes the state next: what it queues on devices comes after the copies queued so far."""
        self._lane.hold()

    def finish(self) -> None:
        """Wait until the copies queued so far are over."""
        self._lane.finish()

    def _lock(self) -> None:
        """Once for an image, if at least half of what comes into it comes from devices."""
        lane = self._lane
        for place in lane.places[:1]:
            for stage in self._all():
                image = stage.image
                if image is not None and not image.is_locked:
                    nbytes = stage.nbytes_of(lambda tensor: lane.place_of(tensor) is not None)
                    if 0 < image.capacity <= 2 * nbytes + _LITTLE:
                        image.lock(self._devices, place)

    def _all(self) -> Sequence[StagedFile | Alike]:
        return (*self._stages, self._alike)

    def seal(self) -> list[Sealed]:
        """Checksums, indexes and directories: what this rank writes is complete. After all copies."""
        sealed = [stage.seal(self._rank, threads=self._threads) for stage in self._stages]
        changed = [name for stage in self._stages for name in stage.changed()]
        alike = self._alike.seal()
        for group, noted in self._noted.items():
            changed += [name for name, digest in noted.items() if alike[group].get(name) != digest]
        if changed:
            raise changed_error(changed)
        return [file for file in sealed if file is not None]

    def let_go(self) -> None:
        """After all: of the state, but not of the memory for it."""
        for stage in self._stages:
            stage.let_go()
        self._alike.let_go()

    def alike(self) -> dict[str, dict[str, str]]:
        """By group: what this rank holds of tensors that one rank writes for several, or that several write. After
        `seal`; `SavePlan.alike` and `FilePlan.sharers` say which."""
        shared = {stage.name: stage.held(self._plan.values) for stage in self._stages if stage.is_shared}
        copies = self._plan.copied
        written = {name: text for stage in self._stages for name, text in stage.digests().items()} if copies else {}
        copied = {group: {name: written[name] for name in names} for group, names in copies.items()}
        return {group: dict(digests) for group, digests in self._alike.digests.items()} | copied | shared
