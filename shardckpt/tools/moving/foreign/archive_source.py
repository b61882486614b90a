"""Read what `torch.save` wrote: one file of any nesting, or the files of a model that an index names.

The pickle is read by our restricted reader, and only for what it says of the tensors: nothing in it runs. A storage's
bytes are read by ranges, and its CRC, which `torch.load` never looks at, is checked wherever one is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.restricted.foreign import StoredShard, StoredView
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.foreign.reading import as_name, check_window, explained, merged, named, read_weight_map
from shardckpt.tools.moving.foreign.views import Gatherer
from shardckpt.tools.moving.foreign.zips import Record, RunningSums, TorchZip, open_zip
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window

INDEX_ENDING = ".bin.index.json"

GATHERED = 32 << 20
"""Bytes of a storage that are in memory at once for tensors that do not lie row by row; and of such a tensor."""
_FEW = 1 << 16
"""Tensors that may be in a tree whatever its size. Each takes more than a byte to be told."""
_MOST_SHARING = 64
_FREE = 64 << 20
"""How much larger than its file the state may be, because tensors share storages: so many times, or so many bytes."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor: in which file, as which view, of which record."""

    file: str
    view: StoredView
    record: Record


class ArchiveSource:
    """A state as `torch.save` was given it; views of the same elements of a storage are ties.

    Tensors that share a storage otherwise come as tensors of their own. The storage is the caller's.
    """

    def __init__(
        self, storage: Storage, key: str, *, gathered_nbytes: int = GATHERED, of_one_rank: bool = False
    ) -> None:
        """`key`: a file, or an index (`*.bin.index.json`) of several.

        `CheckpointNotFoundError` if it is not there, `CheckpointDamagedError` if it is not well-formed, or would run
        code if it were unpickled; also for a DTensor that is not all there, unless it is known to be `of_one_rank`:
        its local tensor is then the tensor, and `shards` says what it is of the whole. `gathered_nbytes`: twice that
        is the memory for tensors that do not lie row by row.
        """
        self._storage = storage
        self._of_one_rank = of_one_rank
        self.shards: dict[str, StoredShard] = {}
        """The tensors that are parts of whole ones."""
        self._stored: dict[str, _Stored] = {}
        self._ties: dict[str, str] = {}
        self._first: dict[tuple[str, StoredView], str] = {}
        self._sums = RunningSums()
        self._gathered = gathered_nbytes
        self._gatherer = Gatherer(gathered_nbytes)
        if key.endswith(INDEX_ENDING):
            files, self._tree = self._several(key)
        else:
            files = {key: open_zip(storage, key)}
            self._tree = self._take(files[key], files[key].tree, ())
        self.is_own = any(file.is_own for file in files.values())
        """Whether it is of a step of ours, of which only the record says whether it counts."""
        self._check_sharing(sum(file.nbytes for file in files.values()), key)

    def _several(self, key: str) -> tuple[dict[str, TorchZip], dict[str, Any]]:
        with explained(named(self._storage, key)):
            weight_map = read_weight_map(self._storage, key)
            files = {file: open_zip(self._storage, file) for file in dict.fromkeys(weight_map.values())}
            for file in files.values():
                if not isinstance(file.tree, Mapping):
                    raise ValueError(f"{file.key} holds no state by names")
            found = merged({name: [*map(str, file.tree)] for name, file in files.items()}, weight_map)
        tree = {name: self._take(files[file], files[file].tree[name], (name,)) for name, file in found.items()}
        return files, tree

    def _take(self, file: TorchZip, tree: Any, path: Path) -> Any:
        """The tree with names for its tensors, which are noted."""
        most = len(self._stored) + len(self._ties) + max(file.tree_nbytes, _FEW)

        def visit(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, (StoredView, StoredShard)):
                return leaf
            name = flat_name(path)
            with explained(named(self._storage, file.key)):
                self._add(file, as_name(name), leaf if isinstance(leaf, StoredView) else self._part(name, leaf))
                if len(self._stored) + len(self._ties) > most:
                    raise ValueError(f"a pickle of {file.tree_nbytes} bytes that unfolds to {most} tensors")
            return TensorName(name)

        return walk(tree, (StoredView, StoredShard), visit, path)

    def _part(self, name: str, shard: StoredShard) -> StoredView:
        if self._of_one_rank:
            self.shards[name] = shard
        elif not shard.is_whole:
            raise ValueError(
                f"{name[:200]} is one rank's part {list(shard.local.shape)} of a tensor {list(shard.shape)}: put the "
                "files of all ranks into one folder, as <name>_<rank>.pt, and name that"
            )
        return shard.local

    def _add(self, file: TorchZip, name: str, view: StoredView) -> None:
        if name in self._stored or name in self._ties:
            raise ValueError(f"two of its tensors are both called {name[:200]!r}")
        record = file.records.get(view.key)
        if record is None and view.storage_nbytes == 0:
            record = Record(0, 0, 0)
        if record is None or record.nbytes != view.storage_nbytes:
            raise ValueError(f"{name[:200]}: its storage {view.key[:200]!r} has not the bytes that it should have")
        first = self._first.setdefault((file.key, view), name)
        if first != name:
            self._ties[name] = first
        else:
            self._stored[name] = _Stored(file.key, view, record)

    def _check_sharing(self, nbytes: int, key: str) -> None:
        total = sum(stored.view.nbytes for stored in self._stored.values())
        if total > max(_MOST_SHARING * nbytes, _FREE):
            what = f"{named(self._storage, key)} is damaged: its {nbytes} bytes are said to make tensors of {total}"
            raise CheckpointDamagedError(what)

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {name: TensorFacts(stored.view.dtype, stored.view.shape) for name, stored in self._stored.items()}

    @property
    def ties(self) -> Mapping[str, str]:
        return dict(self._ties)

    @property
    def tree(self) -> Any:
        return self._tree

    def read(self, windows: Sequence[Window]) -> None:
        direct: list[tuple[_Stored, int, memoryview]] = []
        runs: list[list[Window]] = []
        for window in windows:
            stored = self._stored_as(window.name)
            check_window(window, TensorFacts(stored.view.dtype, stored.view.shape))
            if not len(window.into):
                continue
            if stored.view.is_contiguous:
                at = stored.view.offset * (stored.view.nbytes // stored.view.numel) + window.start
                direct.append((stored, at, window.into))
            elif runs and self._continues(runs[-1], window):
                runs[-1].append(window)
            else:
                runs.append([window])
        self._load(direct)
        for run in runs:
            self._gather(run)

    def _stored_as(self, name: str) -> _Stored:
        return self._stored[self._ties.get(name, name)]

    def _continues(self, run: Sequence[Window], window: Window) -> bool:
        """Whether a window goes on where a run of them ends: what lies between their elements is then read once."""
        last, nbytes = run[-1], sum(len(each.into) for each in run)
        follows = window.name == last.name and window.start == last.start + len(last.into)
        return follows and nbytes + len(window.into) <= self._gathered

    def _gather(self, run: Sequence[Window]) -> None:
        stored = self._stored_as(run[0].name)

        def load(at: int, nbytes: int) -> memoryview:
            content = memoryview(bytearray(nbytes))
            self._load([(stored, at, content)])
            return content

        into = run[0].into if len(run) == 1 else memoryview(bytearray(sum(len(window.into) for window in run)))
        what = (stored.file, stored.view.key)
        self._gatherer.fill(what, stored.view, load, start=run[0].start, into=into)
        if len(run) > 1:
            for window in run:
                at = window.start - run[0].start
                window.into[:] = into[at : at + len(window.into)]

    def _load(self, wanted: Sequence[tuple[_Stored, int, memoryview]]) -> None:
        """Bytes of storages, checked where they complete one."""
        reads = [Read(stored.file, stored.record.at + at, into) for stored, at, into in wanted]
        with explained(f"a file of {self._storage.url}"):
            self._storage.read_into(reads)
        for stored, at, into in wanted:
            record, key = stored.record, (stored.file, stored.view.key)
            if not self._sums.add(key, at, into, nbytes=record.nbytes, crc=record.crc):
                raise CheckpointDamagedError(
                    f"{named(self._storage, stored.file)} is damaged: the bytes of data/{stored.view.key} are not what "
                    "their CRC says (or it was saved with torch.serialization.set_crc32_options(False))"
                )

    def sum_of(self, name: str) -> tuple[Any, ...]:
        """Tensors of which this is the same, of whatever files, have the same content."""
        stored = self._stored_as(name)
        view = stored.view
        return stored.record.crc, stored.record.nbytes, view.dtype, view.offset, view.shape, view.stride

    def close(self) -> None:
        """Nothing is held open."""
