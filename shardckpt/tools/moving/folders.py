"""What lies at a URL, and how it is read: a file, a model's folder, a checkpoint folder of a program, a step of ours.

It is told by the names in a folder, never by unpickling. One process; one look, nothing is remembered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, parse_step
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.tools.moving.dcp_shards import are_shards
from shardckpt.tools.moving.foreign.combined import Combined, Origin, origins
from shardckpt.tools.moving.foreign.hub import in_hub_cache
from shardckpt.tools.moving.foreign.reading import Folder, explained, named, read_json
from shardckpt.tools.moving.foreign.safetensors_source import INDEX_ENDING, SafetensorsSource
from shardckpt.tools.moving.foreign.shapes import as_parts, as_rng, by_parameter, named_parts, step_of
from shardckpt.tools.moving.joining.names import has_folders, is_of_fairseq2, is_of_items
from shardckpt.tools.moving.seam import TensorSource
from shardckpt.tools.place import Place, Where, opened

if TYPE_CHECKING:
    from shardckpt.tools.moving.foreign.archive_source import ArchiveSource

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})/?")
_RNG = re.compile(r"rng_state(?:_([0-9]{1,6}))?\.pth")
_ZIPS = (".pt", ".pth", ".bin", ".ckpt")
_MODELS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""A model in a folder of Hugging Face, the preferred name first."""
_PIECE = re.compile(r".+-[0-9]{5,}-of-[0-9]{5,}\.(?:safetensors|bin)")
"""One of the files of a model that an index names."""
_TRAINER = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "scaler": "scaler.pt"}
_TRAINING = "training_state.pt"
"""What training programs put beside a model: optimizer, schedule, step."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found: how to read it, in words what it is, the training step it says it is of, and what is left out."""

    source: TensorSource
    kind: str
    step: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Parts:
    """The parts of a state, opened as they are wanted."""

    wanted: Collection[str] | None
    tree: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def wants(self, part: str) -> bool:
        return self.wanted is None or part in self.wanted

    def add(self, part: str, make: Callable[[], Any]) -> None:
        if self.wants(part):
            self.tree[part] = by_parameter(make()) if part == "optimizer" else make()

    def wants_beside(self, part: str) -> bool:
        """Whether more than that is wanted."""
        return self.wanted is None or set(self.wanted) != {part}

    def leave(self, folder: Folder, *read: str) -> None:
        """Say which files of the folder, that look as if there were a state in them, are not among those `read`."""
        endings = (*_ZIPS, ".pkl", ".safetensors")
        others = [name for name in folder.names if name.endswith(endings) and not _PIECE.fullmatch(name)]
        left = [name for name in others if name not in read]
        if left and self.wanted is None:
            self.notes.append(f"not read: {', '.join(left)}")

    def add_all(self, parts: Mapping[str, Any]) -> None:
        for part, tree in parts.items():
            self.add(part, lambda tree=tree: tree)  # type: ignore[misc]


def open_source(
    where: Where,
    *,
    parts: Collection[str] | None = None,
    step: int | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> TensorSource:
    """A source for whatever checkpoint lies there; as `find`, for those who only want to read. Close it."""
    return find(where, parts=parts, step=step, storage_options=storage_options).source


def find(
    where: Where,
    *,
    parts: Collection[str] | None = None,
    step: int | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> Found:
    """Look what lies there, and open it. Its state always comes by parts: "model", "optimizer", "scheduler", ...

    `CheckpointNotFoundError` if there is nothing, or no such part; `CheckpointDamagedError` for what is not sound,
    `CheckpointLoadError` for what cannot be read or is of no known form; what `open_storage` raises for a bad URL.

    Args:
        where: a file, a folder, a run or a step; a path, URL or `Storage`.
        parts: only these, if they are given; what the others lie in is not looked at, as far as it is by itself.
        step: which, of a place with several.
        storage_options: for fsspec; never logged.
    """
    with ExitStack() as stack:
        place = in_hub_cache(stack.enter_context(opened(where, storage_options)))
        wanted = _Parts(None if parts is None else frozenset(parts))
        kind, at, source = _look(place, wanted, step)
        holding = stack.pop_all()
        if source is None:
            tree, told = dict(wanted.tree), step_of(wanted.tree)
            source, at = Combined(tree, close=holding.close), told if at is None else at
        else:
            source = Combined(_chosen(origins(source), wanted), close=holding.close)
        missing = [] if parts is None else [part for part in parts if part not in source.tree]
        if missing or not source.tree:
            has = ", ".join(source.tree) or "nothing"
            source.close()
            lacks = f", and not {', '.join(missing)}" if missing else ""
            raise CheckpointNotFoundError(f"{kind} at {place.storage.url} has {has}{lacks}")
        return Found(source, kind, at, tuple(wanted.notes))


def _chosen(tree: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    return {part: below for part, below in tree.items() if parts.wants(part)}


_Look = tuple[str, int | None, TensorSource | None]
"""What it is, of which step; and a source that has parts itself, if they were not added one by one."""


def _look(place: Place, parts: _Parts, step: int | None) -> _Look:
    storage = place.storage
    if place.file:
        return _of_file(storage, place.file, parts)
    folder = Folder.of(storage, place.folder)
    if folder.has(MANIFEST) and parse_step(place.folder) is not None:
        return _own_step(storage, parse_step(place.folder))
    if folder.has(".metadata") or are_shards(folder.names):
        source = _imported("dcp_source", "DcpSource")(storage, folder=place.folder)
        parts.add_all(as_parts(origins(source), Origin))
        return "a checkpoint of DCP", None, None
    if folder.has("trainer_state.json") or folder.has("optimizer.pt"):
        return _of_trainer(folder, parts)
    if any(folder.has(name) for name in _MODELS):
        return _of_model(folder, parts)
    if is_of_fairseq2(folder):
        return _of_fairseq2(folder, parts)
    if is_of_items(folder):
        return _of_items(folder, parts)
    return _of_many(folder, parts, step)


def _of_many(folder: Folder, parts: _Parts, step: int | None) -> _Look:
    """A folder of steps, or one with a single file of a name of its own."""
    storage = folder.storage
    if not folder.key and any(parse_step(name) is not None for name in folder.names):
        steps = Catalog(storage).steps()
        if steps and (step is None or step in steps):
            return _own_step(storage, steps[-1] if step is None else step)
    steps_of = {parse_step(name): name for name in folder.names if name.endswith("/")}
    steps_of |= {int(m[1]): name for name in folder.names if (m := _CHECKPOINT.fullmatch(name)) and name.endswith("/")}
    numbers = [number for number in steps_of if number is not None]
    if numbers:
        at = max(numbers) if step is None else step
        if at not in steps_of:
            raise CheckpointNotFoundError(f"there is no step {at} in {storage.url}", step=at)
        kind, told, source = _look(Place(storage, folder.file(steps_of[at].rstrip("/"))), parts, None)
        return kind, at if told is None else told, source
    for endings in ((INDEX_ENDING,), (".safetensors",), _ZIPS):
        files = [name for name in folder.names if name.endswith(endings)]
        if len(files) == 1:
            return _of_file(storage, folder.file(files[0]), parts)
        if files:
            raise CheckpointLoadError(
                f"{storage.url} holds {len(files)} files that may be meant ({files[0]}, ...): name one"
            )
    if not folder.names:
        raise CheckpointNotFoundError(f"there is nothing in {folder.key or 'the folder'} at {storage.url}")
    raise CheckpointLoadError(f"{folder.key or 'what lies'} at {storage.url} is no checkpoint of any known form")


def _of_file(storage: Storage, key: str, parts: _Parts) -> _Look:
    if key.endswith((".safetensors", INDEX_ENDING)):
        parts.add("model", lambda: origins(SafetensorsSource(storage, key)))
        return "a safetensors file", None, None
    parts.add_all(as_parts(origins(_archive(storage, key)), Origin))
    return "a file of torch.save", None, None


def _of_model(folder: Folder, parts: _Parts) -> _Look:
    parts.add("model", lambda: _model(folder))
    if not (folder.has(_TRAINING) and parts.wants_beside("model")):
        parts.leave(folder, _model_name(folder))
        return "a model's folder", None, None
    key = folder.file(_TRAINING)
    try:
        with explained(named(folder.storage, key)):
            found = named_parts(origins(_archive(folder.storage, key)))
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(f"{error}; the model alone is --part model, parts=['model']") from error
    if "model" in found:
        parts.notes.append(f"the model in {_TRAINING} is not read, but the one beside it")
    parts.add_all({part: tree for part, tree in found.items() if part != "model"})
    parts.leave(folder, _model_name(folder), _TRAINING)
    return f"a model's folder with its {_TRAINING}", None, None


def _model_name(folder: Folder) -> str:
    return next(name for name in _MODELS if folder.has(name))


def _model(folder: Folder) -> Any:
    name = _model_name(folder)
    if "safetensors" in name:
        return origins(SafetensorsSource(folder.storage, folder.file(name)))
    return as_parts(origins(_archive(folder.storage, folder.file(name))), Origin)["model"]


def _of_trainer(folder: Folder, parts: _Parts) -> _Look:
    """`checkpoint-N` of `transformers.Trainer`."""
    if any(folder.has(name) for name in _MODELS):
        parts.add("model", lambda: _model(folder))
    for part, name in _TRAINER.items():
        if folder.has(name):
            parts.add(part, lambda name=name: origins(_archive(folder.storage, folder.file(name))))  # type: ignore[misc]
    streams = {name: match[1] for name in folder.names if (match := _RNG.fullmatch(name))}
    for name, rank in streams.items():
        part = "rng" if rank is None else f"rng_{rank}"
        parts.add(part, lambda name=name: as_rng(origins(_archive(folder.storage, folder.file(name)))))  # type: ignore[misc]
    if folder.has("trainer_state.json"):
        parts.add("progress", lambda: _json(folder, "trainer_state.json"))
    if folder.has("training_args.bin"):
        parts.notes.append("training_args.bin is not read: it is an object of transformers, not a state")
    model = [_model_name(folder)] if any(folder.has(name) for name in _MODELS) else []
    parts.leave(folder, *model, *_TRAINER.values(), *streams, "training_args.bin")
    match = _CHECKPOINT.fullmatch(folder.key.rpartition("/")[2] or folder.storage.url.rstrip("/").rpartition("/")[2])
    return "a checkpoint of Trainer", int(match[1]) if match else None, None


def _json(folder: Folder, name: str) -> Any:
    with explained(named(folder.storage, folder.file(name))):
        content = read_json(folder.storage, folder.file(name), strict=False)
        if type(content) is not dict:
            raise ValueError("it is no JSON object")
        return content


def _of_fairseq2(folder: Folder, parts: _Parts) -> _Look:
    """`step_N` of fairseq2, of any number of ranks."""
    if has_folders(folder):
        found, notes = _imported("joining.ranks", "of_folders")(folder, parts.wants)
        parts.notes += notes
    else:
        only_model = not parts.wants_beside("model") and folder.has("model.pt")
        found = _imported("joining.ranks", "of_rank_files")(folder, only_model=only_model)
    parts.add_all(found)
    name = folder.key.rpartition("/")[2] if folder.key else folder.storage.url.rpartition("/")[2]
    return "a step of fairseq2", parse_step(name), None


def _of_items(folder: Folder, parts: _Parts) -> _Look:
    """A folder of `torch_checkpointing`, as it is by default: `<item>_<rank>.pt`."""
    parts.add_all(_imported("joining.ranks", "of_items")(folder, parts.wants))
    return "a checkpoint of torch_checkpointing", None, None


def _archive(storage: Storage, key: str) -> ArchiveSource:
    source: ArchiveSource = _imported("foreign.archive_source", "ArchiveSource")(storage, key)
    return source


def _own_step(storage: Storage, step: int | None) -> _Look:
    return "a step of shardckpt", step, _imported("step", "StepSource").open(storage, step=step)


def _imported(module: str, name: str) -> Any:
    """A source that needs torch, imported when it is needed."""
    return getattr(import_module(f"shardckpt.tools.moving.{module}"), name)
