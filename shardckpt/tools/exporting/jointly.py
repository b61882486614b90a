"""Write files together with the other ranks of a gang: each a stretch of their bytes, none of them all.

    all       tell where the place is, as they see it (`check_shared`)
    rank 0    looks whether it is free, begins, and tells all what was begun
    all       sum up what they have of the tensors whose CRCs stand before their data; rank 0 joins the sums and tells
    all       write their stretches; tell rank 0 what they have read of tensors that others have read parts of, too
    rank 0    checks those tensors, puts the small files, publishes, and tells all

Stretches go into one file by positioned writes where the storage is a file system, and into the parts of one upload
where it is S3. Where it can do neither, each file is written by one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shardckpt.engine.saving.share import least_share
from shardckpt.errors import CheckpointSaveError
from shardckpt.manager.sharing.check import check_shared
from shardckpt.manager.talk import Talk
from shardckpt.storage.base import PutPart, RenamingStorage, SharedPuts, UploadId
from shardckpt.tools.exporting.shares import Stretch, share_out
from shardckpt.tools.exporting.sink import FileSet, FileSink
from shardckpt.tools.exporting.summing import Extent, checked, crcs_of, sums_of, unsummed
from shardckpt.tools.moving.reading.coverage import PartlyRead
from shardckpt.tools.moving.seam import TensorSource
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.moving.writing.outlet import Outlet, file_of, told_as_save_errors
from shardckpt.tools.moving.writing.stream import LEAST_BUDGET, FileContent, cut

_WRITING = "write the files"


def write_jointly(sink: FileSink, source: TensorSource, own: StepSource, talk: Talk, *, budget_nbytes: int) -> None:
    """As `sink.write`, by all ranks of the gang, each in a conversation that all have entered; each holds at most about
    `budget_nbytes` in memory.

    `source` reads from `own`, and that the same step on all ranks. Errors as of `sink.write`, the same on all ranks;
    `RootNotSharedError` if not all of them see the same place; `GangError` for a rank that did not come.
    """
    with ExitStack() as stack:
        made: list[tuple[FileSet, Outlet]] = []

        def lay_out() -> None:
            out = Outlet.locate(sink.where, endings=sink.ENDINGS, storage_options=sink.storage_options)
            stack.callback(out.close)
            made.append((sink.files(source, file_of(sink.where, sink.ENDINGS)), out))

        talk.gather(lay_out, "lay out the files")  # which reads what is nested how
        ((files, out),) = made
        _Joint(talk, out, source, own, max(budget_nbytes, LEAST_BUDGET)).run(files, sink.beside)


@dataclass(slots=True)
class _Joint:
    talk: Talk
    out: Outlet
    source: TensorSource
    own: StepSource
    budget: int
    shares: list[list[Stretch]] = field(default_factory=list)
    large: list[FileContent] = field(default_factory=list)
    """The files that ranks share."""
    uploads: Mapping[str, UploadId] = field(default_factory=dict)

    def run(self, files: FileSet, beside: Mapping[str, bytes]) -> None:
        self._plan(files.contents(dict.fromkeys(files.crcs, 0)))
        check_shared(self.talk.gang, self.out.storage, timeout=self.talk.timeout)
        try:
            begun = self.talk.from_rank_0(partial(_saving, self.out, self._begin), "begin the files")
            self.out.inside, self.uploads = begun["inside"], begun["uploads"]
            sums = self._sums(files)
            contents = files.contents(crcs_of(self.source, files.crcs, sums.whole))
            self._plan(contents)
            written = self.talk.gather(partial(_saving, self.out, partial(self._write, sums.own)), _WRITING)
            finish = partial(self._finish, contents, beside, written or ())
            self.talk.from_rank_0(partial(_saving, self.out, finish), "publish the files")
        except BaseException:
            self._take_back()
            raise

    @property
    def _stretches(self) -> list[Stretch]:
        return self.shares[self.talk.gang.rank]

    def _plan(self, contents: Sequence[FileContent]) -> None:
        """Who writes what."""
        out, ranks = self.out, self.talk.gang.size
        self.large = [content for content in contents if content.tensors]
        by_ranges = not isinstance(out.storage, RenamingStorage) or out.renames
        least = least_share(out.storage) if by_ranges else None
        self.shares = share_out([content.nbytes for content in self.large], ranks, least=least)

    def _begin(self) -> Any:
        """On rank 0."""
        self.out.claim()
        shared = {self.large[s.file].name for share in self.shares for s in share if not s.whole}
        uploads: dict[str, UploadId] = {}
        self.uploads = uploads
        if isinstance(self.out.storage, SharedPuts):
            for name in sorted(shared):
                uploads[name] = self.out.storage.begin_upload(self.out.key(name))
        elif self.out.inside and isinstance(self.out.storage, RenamingStorage):
            self.out.storage.make_folder(self.out.inside, exist_ok=True)
        return {"inside": self.out.inside, "uploads": uploads}

    def _sums(self, files: FileSet) -> _Sums:
        """The sums of tensors whose CRCs nobody knows: of what this rank has of them, and of them whole."""
        twice = unsummed(self.source, files.crcs)
        if not twice:
            return _Sums({}, {})
        every = (extent for s in self._stretches for extent in _extents(self.large[s.file], s))
        extents = [extent for extent in every if extent[0] in twice]
        own: dict[str, int] = {}

        def sum_up() -> Any:
            own.update(sums_of(self.source, extents, budget_nbytes=self.budget))
            self.own.take_partly_read()  # it is read again, and checked then
            return own

        gathered = self.talk.gather(sum_up, "sum up the tensors")

        def join() -> Any:
            whole = dict.fromkeys(twice, 0)
            for sums in gathered or ():
                for name, total in sums.items():
                    whole[name] ^= total
            return whole

        return _Sums(own, self.talk.from_rank_0(join, "sum up the tensors"))

    def _write(self, before: Mapping[str, int]) -> Any:
        """This rank's stretches; gives what rank 0 must know of them."""
        parts: dict[str, list[list[Any]]] = {}
        for stretch in self._stretches:
            for part in self._put(stretch, before):
                parts.setdefault(self.large[stretch.file].name, []).append([part.number, part.tag, part.nbytes])
        return {"parts": parts, "read": [part.encode() for part in self.own.take_partly_read()]}

    def _put(self, stretch: Stretch, before: Mapping[str, int]) -> Sequence[PutPart]:
        storage, content = self.out.storage, self.large[stretch.file]
        mine = {name: before[name] for name, _, _ in _extents(content, stretch) if name in before}
        span = stretch.start, stretch.stop
        with closing(checked(self.source, content.segments, mine, budget_nbytes=self.budget, stretch=span)) as parts:
            if stretch.whole:
                self.out.put(content.name, parts)
            elif isinstance(storage, RenamingStorage):
                storage.put_range(self.out.key(content.name), stretch.start, parts)
            else:
                assert isinstance(storage, SharedPuts), "only then are files shared"
                numbers, nbytes = stretch.numbers, stretch.stop - stretch.start
                upload = self.uploads[content.name]
                return storage.put_parts(self.out.key(content.name), upload, parts, numbers=numbers, nbytes=nbytes)
        return ()

    def _finish(self, contents: Sequence[FileContent], beside: Mapping[str, bytes], written: Sequence[Any]) -> None:
        """On rank 0, when all is written."""
        out, storage = self.out, self.out.storage
        self.own.check_together(PartlyRead.decode(part) for told in written for part in told["read"])
        for name, small in {} if out.file else beside.items():
            out.put(name, [small])
        for name, upload in self.uploads.items():
            parts = [PutPart(*part) for told in written for part in told["parts"].get(name, ())]
            self._finish_upload(name, upload, parts)
        for content in contents:
            if not content.tensors:
                out.put(content.name, [segment for segment in content.segments if isinstance(segment, bytes)])
            elif storage.size(out.key(content.name)) != content.nbytes:
                raise CheckpointSaveError(f"{content.name} in {out.url} is not as long as what was written to it")
        if out.inside and isinstance(storage, RenamingStorage):
            storage.sync_folder(out.inside)
            out.names = [content.name for content in contents]
        out.publish()

    def _finish_upload(self, name: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        assert isinstance(self.out.storage, SharedPuts)
        try:
            self.out.storage.finish_upload(self.out.key(name), upload, parts)
        except FileExistsError:
            raise  # it is another's
        except BaseException:
            self.out.names.append(name)
            raise
        self.out.names.append(name)

    def _take_back(self) -> None:
        """After any failure; what a rank that did not answer still writes may stay."""
        storage, first = self.out.storage, self.talk.gang.rank == 0
        if first and isinstance(storage, SharedPuts):
            for name, upload in self.uploads.items():
                storage.abort_upload(self.out.key(name), upload)
        if first or not self.out.inside:
            self.out.take_back()


def _extents(content: FileContent, stretch: Stretch) -> Iterator[Extent]:
    """What lies of tensors in a stretch."""
    for segment, first, last in cut(content.segments, stretch.start, stretch.stop):
        if not isinstance(segment, bytes):
            yield segment[0], first, last


@dataclass(frozen=True, slots=True)
class _Sums:
    own: Mapping[str, int]
    whole: Mapping[str, int]


def _saving(out: Outlet, work: Callable[[], Any]) -> Any:
    with told_as_save_errors(out.url):
        return work()
