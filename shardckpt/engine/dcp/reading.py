"""Read what DCP's read items ask for: all ranges at once, checked, and only then handed to the planner."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor

from shardckpt.engine.loading.fetching.fetch import Fetch, Fetched, Need
from shardckpt.engine.loading.integrity import join_sums
from shardckpt.engine.sharding import describe
from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointLoadError, CheckpointMismatchError
from shardckpt.format.index import StoredRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """Where the elements of a read item lie; `record` has the tensor's dimensions in this `order`."""

    need: Need
    record: StoredRecord
    order: tuple[int, ...]


class Origin(Protocol):
    """A checkpoint as one rank of a `dcp.load` sees it. Called in the thread of that call only."""

    @property
    def url(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    def dtype(self, name: str) -> str | None:
        """Of a tensor, as torch calls it; None for what is no tensor."""
        ...

    def open(self, tensors: Sequence[ReadItem], values: Sequence[ReadItem]) -> Fetch:
        """Read what says where the bytes of these items are, and give a way to fetch them."""
        ...

    def find(self, item: ReadItem, position: int) -> Found:
        """Where an item of those lies; `position` is its place in the list."""
        ...

    def stream(self, key: str) -> io.BytesIO:
        """A value as a planner expects it: what `torch.save` writes."""
        ...


class Reading:
    """One rank's part of a `dcp.load`. Used once, in the thread of that call."""

    def __init__(self, origin: Origin, *, cast: bool) -> None:
        self._origin = origin
        self._cast = cast

    def run(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Fill the planner's tensors and values. If it raises, nothing on this rank has been changed."""
        origin = self._origin
        asked = [item for item in items if item.type == LoadItemType.TENSOR]
        tensors = [(item, planner.resolve_tensor(item).detach()) for item in asked]
        values = [item for item in items if item.type == LoadItemType.BYTE_IO]
        fetch: Fetch | None = None
        try:
            with told_as_load_errors(origin.url, origin.step):
                _check_placements(getattr(planner, "state_dict", None))
                self._check_fit(tensors)
                fetch = origin.open(asked, values)
                places = self._read(fetch, tensors)
                streams = [origin.stream(item.storage_index.fqn) for item in values]
            fetch.fill(places, timeout=None)
            for item, target in tensors:
                planner.commit_tensor(item, target)
            for item, stream in zip(values, streams, strict=True):
                planner.load_bytes(item, stream)
        finally:
            if fetch is not None:
                fetch.release()

    def _check_fit(self, tensors: Sequence[tuple[ReadItem, torch.Tensor]]) -> None:
        """All differences at once; DCP itself would convert without a word."""
        problems = []
        for item, target in tensors:
            name = item.storage_index.fqn
            dtype = self._origin.dtype(name)
            if dtype is None:
                problems.append(f"kind: {name} is no tensor in the checkpoint")
            elif target.shape != item.lengths:
                problems.append(f"shape: {name}: {list(item.lengths)} are to be read into {list(target.shape)}")
            elif dtype != str(target.dtype).removeprefix("torch.") and not self._cast:
                problems.append(f"dtype: {name} is {dtype} in the checkpoint, {target.dtype} in the state")
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
            raise CheckpointMismatchError(
                f"{self._origin.url} does not fit the state, and nothing was loaded:{listed}\n"
                "Change the state or, to convert from one dtype to another, DcpReader(..., dtype='cast')",
                problems=list(dict.fromkeys(problems)),
                step=self._origin.step,
            )

    def _read(
        self, fetch: Fetch, tensors: Sequence[tuple[ReadItem, torch.Tensor]]
    ) -> list[tuple[Fetched, torch.Tensor]]:
        """The bytes of every item that has elements, in memory and checked as far as one rank can, and their places."""
        places = []
        for position, (item, target) in enumerate(tensors):
            if all(item.lengths):
                found = self._origin.find(item, position)
                places.append((fetch.add(found.need, found.record), target.permute(found.order)))
        damaged, partial = fetch.read(())
        torn, unchecked = join_sums(partial)
        url = self._origin.url
        if damaged or torn:
            raise CheckpointDamagedError(
                f"{url} is damaged: the bytes of {', '.join(sorted({*damaged, *torn}))} are not those that were "
                "written; nothing was loaded",
                step=self._origin.step,
            )
        if unchecked:
            _log.info("%d bytes of %s were read in part and could not be checked against a digest", unchecked, url)
        return places


@contextmanager
def told_as_load_errors(url: str, step: int | None) -> Iterator[None]:
    """What goes wrong while the files of a checkpoint are read, as `CheckpointLoadError` or its "damaged"."""
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, EOFError) as error:
        raise CheckpointDamagedError(f"{url} is damaged: {error}", step=step) from error
    except (OSError, ValueError) as error:
        raise CheckpointLoadError(f"{url} was not loaded: {error}", step=step) from error


def _check_placements(state: Any) -> None:
    """Refuse DTensors that DCP takes for another part of the whole: it would load the wrong rows, and say nothing.

    2026-11, torch 2.13: where a `_StridedShard` leaves several separate ranges, DCP sees one of their joint size.
    """
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
            continue
        sharding = describe(name, tensor)
        assert sharding is not None
        held = [
            ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.lengths)) for b in sharding.boxes(tensor.shape)
        ]
        if held != [chunk for chunk in tensor.__create_chunk_list__() if all(chunk.sizes)]:
            raise CheckpointLoadError(
                f"{name}: DCP does not understand its placement {list(sharding.placements)} of shape "
                f"{list(tensor.shape)}, and would load the wrong part; redistribute it, or use CheckpointManager.load"
            )
