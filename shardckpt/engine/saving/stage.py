"""Stage: copy this rank's part of the state to its final place in the images of its files. The snapshot is the file.

`Stager.prepare` runs on the caller's thread and only lays out; the copies of what may change at once run there
too; the copies of parameters and optimizer state run on the copying thread while the next forward and backward run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.staging.file import StagedFile, changed_error, crc_of, digest_of
from shardckpt.engine.saving.staging.imaged import ImagedFile
from shardckpt.engine.saving.staging.windowed import WindowedFile
from shardckpt.engine.saving.write import Sealed
from shardckpt.format.manifest import Home
from shardckpt.storage.transfer.several import for_each


class Stager:
    """Keeps the images and layouts from save to save. One per manager; used for one save at a time."""

    def __init__(self, *, least_share: int | None = None, shared: bool = False, threads: int = 2) -> None:
        """`least_share`: from how many bytes on several ranks write a file together; None if they cannot. `shared`:
        whether another process writes."""
        self._shared = shared
        self._slots: dict[Home, ImagedFile] = {}
        self._least_share = least_share
        self._threads = threads

    @property
    def nbytes(self) -> int:
        """Host memory held by the images."""
        return sum(stage.image.capacity for stage in self._slots.values())

    def prepare(self, plan: SavePlan, *, rank: int, windowed: bool = False) -> Staging:
        """Lay the files out and have memory for them. Copies nothing yet.

        `windowed`: nothing is to be copied at all; the state does not change until it has been written.
        """
        stages: list[StagedFile] = []
        for file in plan.files:
            stage = WindowedFile() if windowed else self._slots.setdefault(file.home, ImagedFile(shared=self._shared))
            stage.lay_out(file, least_share=self._least_share)
            stages.append(stage)
        return Staging(stages, plan, rank=rank, threads=self._threads)

    def forsake(self) -> None:
        """Have new images next time: a writer that may still wake up holds on to these."""
        self._slots = {}

    def close(self) -> None:
        """Give the memory back."""
        self._slots = {}


class Staging:
    """One save's way into the images."""

    def __init__(self, stages: Sequence[StagedFile], plan: SavePlan, *, rank: int, threads: int) -> None:
        self._stages = stages
        self._plan = plan
        self._rank = rank
        self._threads = threads
        self._alike: dict[str, dict[str, str]] = {}
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
        jobs = [job for stage in self._stages for job in stage.notes()]
        for_each(jobs, lambda job: job(), threads=self._threads)
        for group, tensors in self._plan.alike.items():
            self._noted[group] = {
                name: digest_of(tensor.dtype, tuple(tensor.shape), crc_of(tensor)) for name, tensor in tensors
            }

    def copy(self, wanted: Callable[[torch.Tensor], bool]) -> None:
        """Copy the tensors for which `wanted` holds, and sum up those that others write. Done when it returns."""
        jobs: list[Callable[[], None]] = []
        for stage in self._stages:
            jobs += stage.jobs(wanted)
        for_each(jobs, lambda job: job(), threads=self._threads)
        for group, tensors in self._plan.alike.items():
            digests = self._alike.setdefault(group, {})
            for name, tensor in tensors:
                if wanted(tensor):
                    digests[name] = digest_of(tensor.dtype, tuple(tensor.shape), crc_of(tensor))

    def seal(self) -> list[Sealed]:
        """Checksums, indexes and directories: what this rank writes is complete. After all copies."""
        sealed = [stage.seal(self._rank, threads=self._threads) for stage in self._stages]
        changed = [name for stage in self._stages for name in stage.changed()]
        for group, noted in self._noted.items():
            changed += [name for name, digest in noted.items() if self._alike[group].get(name) != digest]
        if changed:
            raise changed_error(changed)
        return [file for file in sealed if file is not None]

    def let_go(self) -> None:
        """After all: of the state, but not of the memory for it."""
        for stage in self._stages:
            stage.let_go()

    def alike(self) -> dict[str, dict[str, str]]:
        """By group: what this rank holds of tensors that one rank writes for several, or that several write. After
        `seal`; `SavePlan.alike` and `FilePlan.sharers` say which."""
        shared = {stage.name: stage.held(self._plan.values) for stage in self._stages if stage.is_shared}
        written = {name: text for stage in self._stages for name, text in stage.digests.items()}
        copied = {group: {name: written[name] for name in names} for group, names in self._plan.copied.items()}
        return {group: dict(digests) for group, digests in self._alike.items()} | copied | shared
