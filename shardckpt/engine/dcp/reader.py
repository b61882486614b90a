"""`DcpReader`, the storage of `dcp.load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.dcp.foreign.folder import DcpFolder
from shardckpt.engine.dcp.foreign.origin import ForeignOrigin, metadata_of
from shardckpt.engine.dcp.metadata import UnreadableMetadata, make_metadata
from shardckpt.engine.dcp.own import OwnOrigin
from shardckpt.engine.dcp.place import find_record, place_of
from shardckpt.engine.dcp.reading import Origin, Reading, told_as_load_errors
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.sources import Sources
from shardckpt.errors import CheckpointError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.manifest import Manifest
from shardckpt.storage import Storage


@dataclass(frozen=True, slots=True)
class _Seat:
    """In a final plan: which rank of how many this is."""

    rank: int
    world_size: int


class DcpReader(StorageReader):  # type: ignore[misc, unused-ignore]
    """Loads one checkpoint through DCP: `dcp.load(state_dict, storage_reader=DcpReader("s3://lab/runs/a/step_100"))`.

    Any checkpoint of this package: written by `DcpWriter` or by a `CheckpointManager`, on any number of ranks. Only
    the ranges that a rank needs are read, many at once; nothing from a file is ever run. What was saved with different
    values by each rank is given back to the same ranks of a job of the same size, and refused to others.

    And any that DCP's own writers made (a folder with `.metadata`), with torch 2.3 or later: its metadata and its
    values are read by an allow-list, and values that need code to be loaded are refused when they are asked for.

    Made on every rank, with the same URL; used by one load at a time; its methods are called by DCP, in the thread of
    `dcp.load`. An error on any rank is raised by DCP on all, as its `CheckpointException`, which names the
    `CheckpointLoadError` of each rank that failed. On a rank that failed the state is as it was; others may have
    loaded theirs: do not train on.

    Args:
        url: the checkpoint: a path or URL whose last part is its folder. DCP's `checkpoint_id` replaces it.
        storage: an opened root; `url` is then the name of a folder in it.
        storage_options: for fsspec; never logged.
        dtype: what to do with a tensor whose dtype is not the checkpoint's: refuse to load, or convert it.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage: Storage | None = None,
        storage_options: Mapping[str, object] | None = None,
        dtype: Literal["error", "cast"] = "error",
    ) -> None:
        self._place = place_of(url, storage=storage, storage_options=storage_options)
        self._cast = dtype == "cast"
        self._open: Storage | None = None
        self._found: tuple[str, Manifest] | DcpFolder | None = None

    def __repr__(self) -> str:
        return f"DcpReader({self._place.url!r})"

    @property
    def checkpoint_id(self) -> str:
        """The URL, without credentials: DCP logs it."""
        return self._place.url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            place_of(checkpoint_id)
        except ValueError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._found = None
        if checkpoint_id is not None:
            self.close()
            self._place = self._place.moved_to(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """What is in the checkpoint. If it cannot be read, whoever looks into the result gets the error.

        (`options` is not called "kwargs" because DCP would then call again, for a format that is none of ours.)
        """
        try:
            self._found = self._find()
        except CheckpointError as error:
            return UnreadableMetadata(error)
        if isinstance(self._found, DcpFolder):
            return metadata_of(self._found)
        folder, manifest = self._found
        contents = Contents(self._storage, folder, manifest)

        def trees() -> list[Any]:
            names = [file.name for file in manifest.files if file.tree is not None]
            with told_as_load_errors(self.checkpoint_id, manifest.step):
                contents.open((), names)
                return [contents.subtree([name], ()) for name in names]

        return make_metadata(Sources(manifest, _at(manifest, 0, 0)), trees, checkpoint_id=self.checkpoint_id)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, UnreadableMetadata):
            raise metadata.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        found = self._record
        return replace(plan, storage_data=found.digest if isinstance(found, DcpFolder) else found[1].attempt)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank has read the record by itself: they must have read the same one."""
        if len({plan.storage_data for plan in plans}) > 1:
            raise CheckpointLoadError(
                f"{self._place.url} was replaced while it was being loaded; load it again", step=self._place.step
            )
        return [replace(plan, storage_data=_Seat(rank, len(plans))) for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        found, seat = self._record, plan.storage_data
        if not isinstance(seat, _Seat):
            raise CheckpointLoadError(f"{self._place.url}: the planner lost what the reader put into its plan")
        origin: Origin
        if isinstance(found, DcpFolder):
            origin = ForeignOrigin(self._storage, found)
        else:
            origin = OwnOrigin(self._storage, *found, _at(found[1], seat.rank, seat.world_size))
        Reading(origin, cast=self._cast).run(plan.items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def close(self) -> None:
        """Give back the connection, if this reader opened one. It opens another when it is used again."""
        if self._open is not None and isinstance(self._place.root, str):
            self._open.close()
        self._open = None

    @property
    def _storage(self) -> Storage:
        if self._open is None:
            self._open = self._place.open()
        return self._open

    def _find(self) -> tuple[str, Manifest] | DcpFolder:
        try:
            return find_record(self._storage, self._place.folder)
        except CheckpointNotFoundError:
            return DcpFolder(self._storage, self._place.folder)

    @property
    def _record(self) -> tuple[str, Manifest] | DcpFolder:
        if self._found is None:
            raise CheckpointLoadError(f"{self._place.url}: DCP has not asked for the metadata yet")
        return self._found


def _at(manifest: Manifest, rank: int, world_size: int) -> Coordinates:
    """Where a loading rank stands. DCP knows no mesh: a job of the same size is taken for one of the same shape."""
    if world_size != manifest.world_size:
        return Coordinates(rank, world_size, 0, 1, (rank,))
    return Coordinates(rank, world_size, manifest.shard_of[rank], manifest.shards, (rank,))
