"""One attempt to commit a step, as the ranks go through it together. On the save thread of every rank.

    begin     rank 0 draws an attempt id and makes room for it; all learn the id
    write     every rank writes its own files; rank 0 gets the receipts
    compare   what one rank wrote for all must be the same on all
    commit    rank 0 composes the record of the receipts and puts it in force; all are told

Until the record is in force a failure on any rank means that there is no such step. Afterwards nothing that happens
to the other ranks takes it back: a rank that does not hear of it raises `CommitUnknownError`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from shardckpt.engine.background.lease import Lease, LeasedGang
from shardckpt.engine.committing.bundles import as_bundle, fold_bundles, open_bundles
from shardckpt.engine.committing.commit import abandon_attempt, attempt_prefix, begin_attempt, commit_attempt
from shardckpt.engine.committing.receipts import TableBook, compose_manifest, disagreements, explain, held_of
from shardckpt.engine.patience import Limit, within
from shardckpt.engine.progress import OtherRank
from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.write import Receipt
from shardckpt.engine.splits.pieces import check_agreed
from shardckpt.errors import CheckpointSaveError, CommitUnknownError, GangError, RootNotSharedError
from shardckpt.format.checksum import crc32
from shardckpt.format.index import decode_index
from shardckpt.format.layout import CONSOLIDATED, new_attempt
from shardckpt.format.manifest import Manifest
from shardckpt.format.reduced import reduce_to_model
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather
from shardckpt.storage.base import Read, SharedPuts, Storage, UploadId
from shardckpt.storage.transfer.several import for_each

_FINISHING = 8
"""Uploads that are finished at the same time."""

Alike = Mapping[str, Mapping[str, str]]
"""By file: key to a digest of what this rank holds of it."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What all ranks know of a step that is in force."""

    nbytes: int
    created: str
    slowest_rank: int
    slowest_s: float


class Transaction:
    """One attempt; made anew for each save. Any method may raise; then `abandon` is to be called."""

    def __init__(
        self,
        storage: Storage,
        gang: Gang,
        book: TableBook,
        *,
        step: int,
        limit: Limit,
        lease: Lease,
        began: float,
        given_up: Collection[str] = (),
    ) -> None:
        """`given_up`: the scopes of saves that this rank let fail while their thread hung, maybe before it met
        anybody."""
        self._storage = storage
        self._given_up = given_up
        self._gang: Gang = LeasedGang(gang, lease)
        self._lease = lease
        self._book = book
        self._step = step
        self._limit = limit
        self._began = began
        self._all_began: list[float] | None = None
        """On rank 0, by rank, once they have met."""
        self._prefix = ""
        self._attempt = ""
        self._bundles: Sequence[Any] | None = None
        """On rank 0, what all have said of what they wrote; opened where they hear if that goes wrong."""
        self._receipts: Sequence[Receipt] | None = None
        self._differ: Sequence[str] = ()
        self._uploads: dict[str, UploadId] = {}
        self._known: bytes | None = None
        """On rank 0, on an object store: the step's record that was in force when the attempt began."""
        self._may_be_in_force = False
        self._is_apart = False
        """Whether what ranks have written does not lie in one place, so that each has to remove it where it is."""
        self.has_met = False
        """Whether this rank has gone to meet the others. Until then they wait for it."""

    @property
    def prefix(self) -> str:
        """Where the files of the attempt go, once it has begun."""
        return self._prefix

    def begin(self, scope: str, ready: Callable[[], None] = lambda: None) -> None:
        """Meet under this name, hear whether all are ready (`ready` raises where one is not), agree on an attempt id,
        make room."""
        self.has_met = True
        self._gang.enter(scope, timeout=self._limit.talk, skipped=tuple(self._given_up))

        def meet() -> float:
            ready()
            return self._began

        began: Any = together_gather(self._gang, meet, phase="stage", **self._terms)
        self._all_began = began
        self._attempt = str(announce(self._gang, new_attempt, phase="begin", **self._terms))
        self._prefix = attempt_prefix(self._storage, self._step, self._attempt)
        announce(self._gang, self._make_room, phase="begin", **self._terms)

    def begin_uploads(self, led: Callable[[], Sequence[str]]) -> Mapping[str, UploadId]:
        """Begin the uploads of the files that ranks put together, and tell all of them; `led` gives those that this
        rank answers for. Nothing is said where the storage knows no such uploads, or there is but one rank."""
        storage = self._storage
        if not isinstance(storage, SharedPuts) or self._gang.size == 1:
            return {}

        def begin() -> Any:
            return [[name, storage.begin_upload(f"{self._prefix}/{name}")] for name in led()]

        def join() -> Any:
            return [pair for own in gathered for pair in own]

        work = partial(within, self._limit.work, begin, what="beginning uploads")
        gathered: Any = together_gather(self._gang, work, phase="write", **self._terms)
        self._uploads = dict(announce(self._gang, join, phase="write", **self._terms))
        return self._uploads

    def write(self, work: Callable[[str], Receipt]) -> None:
        """Every rank does its `work`, given the prefix of the attempt; rank 0 gets the receipts, for `compare`."""
        terms: dict[str, Any] = {"phase": "write", "fold": fold_bundles, **self._terms}
        gathered: Any
        try:
            gathered = together_gather(self._gang, lambda: as_bundle(work(self._prefix)), **terms)
        except GangError as error:
            kinds = {failure.kind for failure in error.failures.values()}
            self._is_apart = RootNotSharedError.__name__ in kinds
            raise
        self._bundles = gathered

    def compare(self, alike: Alike) -> None:
        """Raise on all ranks, naming keys and ranks, if two of them hold different values of what is stored once."""
        self._lease.may_be_in_force = self._gang.rank > 0  # rank 0 asks nobody any more

        def differing() -> list[str]:
            bundle = open_bundles(self._bundles or ())
            self._receipts, self._differ = bundle.receipts, bundle.differ
            return disagreements(bundle.receipts)

        doubtful = announce(self._gang, differing, phase="compare", **self._terms)
        if not doubtful:
            return
        held: Any = together_gather(self._gang, lambda: held_of(doubtful, alike), phase="compare", **self._terms)
        message = announce(self._gang, lambda: explain(held, self._receipts or ()), phase="compare", **self._terms)
        raise CheckpointSaveError(f"step {self._step} was not saved: {message}", step=self._step)

    def commit(
        self,
        plan: SavePlan,
        metadata: Mapping[str, Any],
        *,
        model_key: str = "model",
        beside: Callable[[], Mapping[str, bytes]] = dict,
    ) -> Committed:
        """The record is composed from the receipts and nothing else, and put in force. `beside`: small files that it
        does not name, by name, and that are there when it is; asked for on rank 0."""
        sent = self._book.ask(self._gang, plan, self._receipts, **self._terms)

        def commit() -> list[Any]:
            began, patience_s = time.monotonic(), self._limit.talk.total_seconds()
            receipts = self._receipts or []
            tables = self._book.learn(receipts, sent)
            check_agreed(tables.tables, tables.layouts)
            created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            facts = (self._step, self._attempt, created, receipts, tables, dict(metadata))
            manifest = compose_manifest(*facts, differ=self._differ)
            manifest = self._of_model_only(replace(manifest, model_key=model_key))
            if not any(table.tensors or table.values for table in manifest.tables):
                raise CheckpointSaveError("the state that was given is empty on all ranks", step=self._step)
            slowest = max(receipts, key=lambda receipt: receipt.seconds["write"])
            self._limit.check()
            self._lease.beat()
            within(self._limit.work, partial(self._finish_uploads, receipts), what="finishing the uploads")
            within(self._limit.work, partial(self._put_beside, beside()), what="writing score and metrics")
            if (took_s := time.monotonic() - began) > patience_s:
                raise TimeoutError(
                    f"it took {took_s:.3g} s to come to the record: this process stood still, or its storage"
                )
            self._put_in_force(manifest)
            return [manifest.nbytes, created, slowest.rank, slowest.seconds["write"]]

        try:
            return Committed(*announce(self._gang, commit, phase="commit", **self._terms))
        except GangError as error:
            if error.failures:
                raise
            raise CommitUnknownError(
                f"whether step {self._step} was committed is not known here, since rank 0 did not say: {error.brief}",
                step=self._step,
            ) from error

    def others(self) -> tuple[OtherRank, ...]:
        """On rank 0, once all have met: when the other ranks began, and what they did until their files were
        written."""
        phases = {receipt.rank: receipt.phases for receipt in self._receipts or ()}
        met = enumerate(self._all_began or ())
        return tuple(OtherRank(rank, began, phases.get(rank, ())) for rank, began in met if rank)

    def _finish_uploads(self, receipts: Sequence[Receipt]) -> None:
        """Make objects of the parts that the ranks have receipts for. Before the record, and all bytes are known to be
        there."""

        def finish(upload: tuple[str, UploadId]) -> None:
            name, number = upload
            parts = [part for receipt in receipts for part in receipt.parts.get(name, ())]
            assert isinstance(self._storage, SharedPuts)
            self._storage.finish_upload(f"{self._prefix}/{name}", number, parts)

        for_each(self._uploads.items(), finish, threads=_FINISHING)

    def _put_beside(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            self._storage.put(f"{self._prefix}/{name}", [content])

    def _of_model_only(self, manifest: Manifest) -> Manifest:
        """The record of a step without a state: it has the consolidated model, and that alone."""
        one = next((file for file in manifest.files if file.kind == CONSOLIDATED), None)
        if one is None or one.index is None or manifest.parts:
            return manifest
        at, nbytes, crc = one.index
        content = bytearray(nbytes)
        read = [Read(f"{self._prefix}/{one.name}", at, memoryview(content))]
        self._lease.beat()
        within(self._limit.timeout, lambda: self._storage.read_into(read), what="reading the model's index")
        if crc32(content) != crc:
            raise CheckpointSaveError(f"{one.name} is not what was just written: its index is damaged", step=self._step)
        return reduce_to_model(manifest, consolidated=decode_index(bytes(content), one.nbytes)).manifest

    def abandon(self) -> None:
        """After a failure: remove what the attempt left, on rank 0, unless it may be in force."""
        self._lease.beat()
        if (self._gang.rank == 0 or self._is_apart) and self._prefix and not self._may_be_in_force:
            with contextlib.suppress(TimeoutError):
                remove = partial(abandon_attempt, self._storage, self._prefix)
                within(self._limit.timeout, remove, what="removing the attempt")

    def _make_room(self) -> None:
        make = partial(begin_attempt, self._storage, self._prefix)
        self._known = within(self._limit.work, make, what="making room for the attempt")

    def _put_in_force(self, manifest: Any) -> None:
        self._may_be_in_force = True
        try:
            with self._lease.held():
                self._lease.may_be_in_force = True
                within(
                    self._limit.talk,  # not less: whatever it ends with, it is better than not to know
                    lambda: commit_attempt(self._storage, self._prefix, manifest, known=self._known),
                    what="putting the record in force",
                )
        except CommitUnknownError:
            raise
        except TimeoutError as error:
            raise CommitUnknownError(str(error), step=self._step) from error
        except Exception:
            self._may_be_in_force = self._lease.may_be_in_force = False  # the seam has made sure of that
            raise

    @property
    def _terms(self) -> dict[str, Any]:
        return {"timeout": self._limit.talk, "step": self._step}
