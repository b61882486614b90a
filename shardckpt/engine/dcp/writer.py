"""`DcpWriter`, the storage of `dcp.save` and `dcp.async_save`: they bring the coordination, we files and commit."""

from __future__ import annotations

import logging
import os
import secrets
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardckpt.engine.committing.commit import (
    abandon_attempt,
    attempt_prefix,
    begin_attempt,
    check_room,
    commit_attempt,
)
from shardckpt.engine.committing.receipts import describe_own
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.dcp.exchange import Assignment, Attempt, Request, Written, compose, difference
from shardckpt.engine.dcp.image import digest_of, host_bytes, seal_in_place
from shardckpt.engine.dcp.items import Content, OwnItems, collect, own_items
from shardckpt.engine.dcp.place import Place, place_of
from shardckpt.engine.saving.plan import SavePlan as OurPlan
from shardckpt.engine.saving.write import SealedFile
from shardckpt.errors import CheckpointError, CheckpointSaveError, CommitUnknownError, Failure
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import new_attempt, parse_aside
from shardckpt.format.manifest import Table
from shardckpt.storage import Storage

_log = logging.getLogger(__name__)


class DcpWriter(StorageWriter):  # type: ignore[misc, unused-ignore]
    """Saves one checkpoint through DCP: `dcp.save(state_dict, storage_writer=DcpWriter("s3://lab/runs/a/step_100"))`.

    What it writes is an ordinary checkpoint of this package, whole or absent; one that is there already is replaced at
    the commit. Made on every rank, with the same URL; used by one save at a time, again if you like; its methods are
    called by DCP, in the thread of `dcp.save` or of DCP's own background thread or process.

    An error on any rank is raised by DCP on all, as its `CheckpointException`, and nothing is committed.

    Args:
        url: the checkpoint: a path or URL whose last part is its folder. `step_<n>` is step n of the run that its
            parent is, and is found there by a `CheckpointManager`. DCP's `checkpoint_id` replaces it.
        storage: an opened root; `url` is then the name of a folder in it.
        storage_options: for fsspec; never logged or recorded.
        unsharded: DCP stores one of the tensors that several ranks hold under one key and that are no DTensors. They
            must be alike on all of these ranks ("alike": the save fails if they are not), or it does not matter
            which is stored ("any").
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage: Storage | None = None,
        storage_options: Mapping[str, object] | None = None,
        unsharded: Literal["alike", "any"] = "alike",
    ) -> None:
        self._place = _writable(place_of(url, storage=storage, storage_options=storage_options))
        self._unsharded = unsharded
        self._open: Storage | None = None
        self._once = ""
        self._own: OwnItems | None = None
        self._attempt: Attempt | None = None

    def __repr__(self) -> str:
        return f"DcpWriter({self._place.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        """For DCP's background process, which makes its own connection."""
        return {**self.__dict__, "_open": None, "_own": None, "_attempt": None}

    @property
    def checkpoint_id(self) -> str:
        """The URL, without credentials: DCP logs it."""
        return self._place.url

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            place_of(checkpoint_id)
        except ValueError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._sweep()
            self.close()
            self._place = _writable(self._place.moved_to(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):  # passed on because a parameter is called "kwargs"
            raise CheckpointSaveError(
                "use_collectives=False writes what no rank commits; leave it out", step=self._step
            )
        self._sweep()
        self._own = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not plan.usable:
            raise self._stale_plan()
        self._once = secrets.token_hex(8)
        self._own = own_items(plan)
        return replace(plan, storage_data=Request(self._once, self._own.keys.digest))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        requests = [plan.storage_data for plan in plans]
        if not all(isinstance(request, Request) for request in requests):
            raise self._stale_plan()
        groups: dict[str, list[int]] = {}
        for rank, request in enumerate(requests):
            groups.setdefault(request.keys, []).append(rank)
        attempt, storage, folder = new_attempt(), self._storage, self._place.folder
        prefix = attempt_prefix(storage, self._place.step or 0, attempt, folder=folder)
        told = {digest: tuple(ranks) for digest, ranks in groups.items()}
        try:
            known = begin_attempt(storage, prefix)
        except OSError as error:
            raise self._error(f"it cannot be begun: {error}") from error
        self._attempt = Attempt(attempt, prefix, folder, self._place.step or 0, told, known)
        return [
            replace(
                plan,
                storage_data=Assignment(
                    request.once, rank, len(plans), prefix, tell_keys=told[request.keys][0] == rank
                ),
            )
            for rank, (plan, request) in enumerate(zip(plans, requests, strict=True))
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file. What goes wrong is handed to the coordinator instead of being raised.

        For DCP tells the ranks of an exception, but not the writer: nobody would remove what the others have written.
        """
        answer: Written | Failure
        rank = getattr(plan.storage_data, "rank", 0)
        try:
            answer = self._write(plan, planner)
        except BaseException as error:  # whatever it is, DCP would turn it into its own exception
            trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            answer = Failure(rank, type(error).__name__, str(error), trace)
        nbytes = sum(file.nbytes for file in answer.receipt.files) if isinstance(answer, Written) else 0
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(f"rank {rank}"), nbytes, answer)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The commit."""
        try:
            self._commit([result.storage_data for of_rank in results for result in of_rank])
        except CommitUnknownError:
            self._attempt = None  # it may be in force: nothing may be deleted
            raise
        except BaseException:
            self._sweep()
            raise
        self._attempt = None
        metadata.storage_meta = self.storage_meta()

    def close(self) -> None:
        """Give back the connection, if this writer opened one. It opens another when it is used again."""
        if self._open is not None and isinstance(self._place.root, str):
            self._open.close()
        self._open = None

    @property
    def _storage(self) -> Storage:
        if self._open is None:
            self._open = self._place.open()
        return self._open

    @property
    def _step(self) -> int | None:
        return self._place.step

    def _write(self, plan: SavePlan, planner: SavePlanner) -> Written:
        task, own = plan.storage_data, self._own
        if own is None or not isinstance(task, Assignment) or task.once != self._once:
            raise self._stale_plan()
        if self._attempt is None:  # of all but the coordinator
            check_room(self._storage, task.prefix)
        content = collect(plan, planner, own, rank=task.rank)
        sealed = [seal_in_place(content.file, rank=task.rank)] if content.file.records or content.values else []
        began = time.perf_counter()
        for file in sealed:
            self._storage.put(f"{task.prefix}/{file.entry.name}", file.parts)
        at = Coordinates(task.rank, task.world_size, 0, 1, tuple(range(task.world_size)))
        ours = OurPlan((), (), (), Table((task.rank,), {}, dict.fromkeys(content.values, "rank")), content.values, {})
        files = tuple(file.entry for file in sealed)
        receipt = describe_own(at, ours, sealed, files, {}, {"write": time.perf_counter() - began})
        compared = self._unsharded == "alike" and task.world_size > 1
        unsharded = _digests(content, own, sealed) if compared else {}
        return Written(receipt, content.boxes, unsharded, own.keys if task.tell_keys else None)

    def _commit(self, answers: Sequence[Any]) -> None:
        attempt = self._attempt
        if attempt is None:
            raise self._error("DCP asks for the commit of a save that was not begun")
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        if failures:
            traces = "".join(f"\n\nOn rank {failure.rank}:\n{failure.trace}" for failure in failures[:4])
            raise self._error(f"{'; '.join(map(str, failures))}{traces}")
        written = sorted(answers, key=lambda answer: answer.receipt.rank)
        if [report.receipt.rank for report in written] != sorted(
            rank for group in attempt.groups.values() for rank in group
        ):
            raise self._error("not every rank has answered")
        differing = difference(written)
        if differing:
            raise self._error(differing)
        created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            manifest = compose(attempt, written, created=created)
            commit_attempt(self._storage, attempt.prefix, manifest, folder=attempt.folder, known=attempt.known)
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise self._error(f"the commit failed: {error}") from error
        _log.info("%s committed: %.2f GB", self._place.url, manifest.nbytes / 1e9)

    def _sweep(self) -> None:
        """Remove an attempt of this writer that did not commit. On the coordinator; elsewhere there is none."""
        if self._attempt is not None:
            abandon_attempt(self._storage, self._attempt.prefix)
            self._attempt = None

    def _error(self, reason: str) -> CheckpointSaveError:
        return CheckpointSaveError(f"{self._place.url} was not saved: {reason}", step=self._step)

    def _stale_plan(self) -> CheckpointSaveError:
        return self._error(
            "the planner hands the writer the plan of another save; make it with enable_plan_caching=False: every "
            "save writes in a folder of its own, and a cached plan does not say which"
        )


def _writable(place: Place) -> Place:
    if parse_aside(place.folder) is not None:
        raise ValueError(f"{place.url}: a name like this is for saves that have not committed; choose another")
    return place


def _digests(content: Content, own: OwnItems, sealed: Sequence[SealedFile]) -> dict[str, str]:
    """What this rank holds of the tensors that are not sharded, whether it or another rank writes them."""
    names = {item.index.fqn for item in own.unsharded}
    written = {name: text for file in sealed for name, text in file.digests().items() if name in names}
    held = {name: digest_of(tensor, crc32(host_bytes(tensor))) for name, tensor in content.held}
    return written | held
