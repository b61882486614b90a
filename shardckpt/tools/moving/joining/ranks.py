"""Which file is which rank's, in the folders of programs where each rank writes its own; and their state, by parts.

Sources: fairseq2 0.1 (`rank_<r>.pt`, `model.<s>.pt`, `replicated.<s>.pt`) and 0.8.1 (`fairseq2/checkpoint/manager.py`,
`fairseq2/model_checkpoint/native.py`: `model/pp_XX/tp_XX/sdp_XX.pt`, joined in the first dimension over sdp);
`torch_checkpointing` 0.1.1 (`<item>_<rank>.pt`, whose DTensors say where they belong).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from shardckpt.errors import CheckpointLoadError
from shardckpt.format.placement import Box
from shardckpt.tools.moving.foreign.archive_source import ArchiveSource
from shardckpt.tools.moving.foreign.combined import origins
from shardckpt.tools.moving.foreign.reading import Folder, explained, named
from shardckpt.tools.moving.foreign.shapes import named_parts
from shardckpt.tools.moving.joining.joined import Extent, JoinedSource, Share
from shardckpt.tools.moving.joining.names import FOLDERS, ITEM, OF_SHARD, RANK, numbered
from shardckpt.tools.moving.seam import TensorFacts

_JOINED = ("model", "optimizer")
"""Parts of which a rank's own would be no state, unless something says how they join."""

Wants = Callable[[str], bool]


def of_items(folder: Folder, wants: Wants) -> dict[str, Any]:
    """A folder of `torch_checkpointing`, as it is by default; each item is a part."""
    files: dict[str, dict[int, str]] = {}
    for name in folder.names:
        match = ITEM.fullmatch(name)
        if match is not None:
            files.setdefault(match[1], {})[int(match[2])] = name
    found: dict[str, Any] = {}
    for item, of_item in files.items():
        if wants(item) or any(wants(f"{item}_{rank}") for rank in of_item):
            found |= _parts_of(_shares(folder, of_item), item, folder)
    return found


def of_rank_files(folder: Folder, *, only_model: bool) -> dict[str, Any]:
    """A step of fairseq2 up to 0.4, as its `load_checkpoint` puts it together on each rank, of all ranks."""
    groups: dict[str, dict[int, str]] = {"rank": {}, "replicated": {}, "model": {}}
    for name in folder.names:
        rank, shard = RANK.fullmatch(name), OF_SHARD.fullmatch(name)
        if rank is not None:
            groups["rank"][int(rank[1])] = name
        elif shard is not None:
            groups[shard[1]][int(shard[2])] = name
    for kind in ("replicated", "model"):
        if folder.has(f"{kind}.pt"):
            groups[kind] = {0: f"{kind}.pt"}
    found: dict[str, Any] = {}
    for kind, files in groups.items():
        if files and (kind == "model" or not only_model):
            with explained(named(folder.storage, folder.file(files[min(files)]))):
                shares = _not_ours(_shares(folder, files), folder)
                found |= named_parts(_parts_of(shares, None, folder))
    return found


def of_folders(folder: Folder, wants: Wants) -> tuple[dict[str, Any], list[str]]:
    """A step of fairseq2 0.8; and what of it is not read."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    for part in (part for part in FOLDERS if folder.has(f"{part}/") and wants(part)):
        within = Folder.of(folder.storage, folder.file(part))
        if part in _JOINED:
            groups = [list(_cut_in_rows(group, plain=part == "model")) for group in _groups(within)]
            shares = [share for group in groups for share in group]
            notes += [note for group in groups for note in _copies_in_rows(group)]
        else:
            shares = _shares(within, numbered(within))
        found |= _parts_of(shares, part, folder) if shares else {}
    others = [name for name in folder.names if name.endswith("/") and name.rstrip("/") not in FOLDERS]
    return found, [*notes, *(f"{name.rstrip('/')} is not read" for name in others)]


def _groups(folder: Folder) -> Iterator[list[Share]]:
    """The files of each pipeline stage and tensor-parallel rank: those of the ranks among which it is sharded."""
    for stage in numbered(folder).values():
        within = Folder.of(folder.storage, folder.file(stage))
        for rank in numbered(within).values():
            files = Folder.of(folder.storage, within.file(rank))
            yield _shares(files, numbered(files))


def _shares(folder: Folder, files: Mapping[int, str]) -> list[Share]:
    """The files of ranks, in their order. `CheckpointLoadError` if one is missing in between."""
    gap = next((number for number in range(len(files)) if number not in files), None)
    if gap is not None:
        raise CheckpointLoadError(
            f"{_where(folder)} has {files[max(files)]}, but none of number {gap}: put the files of all ranks there"
        )
    several = len(files) > 1
    keys = [folder.file(files[number]) for number in sorted(files)]
    return [Share.of(ArchiveSource(folder.storage, key, of_one_rank=several), key) for key in keys]


def _not_ours(shares: Sequence[Share], folder: Folder) -> Sequence[Share]:
    """Our own files have these names, too; only a record says whether they count."""
    if any(share.source.is_own for share in shares):
        raise CheckpointLoadError(
            f"{_where(folder)} was never committed, or has lost its record: `shardckpt repair` says what can be done; "
            "or name the one file that you want"
        )
    return shares


def _cut_in_rows(shares: Sequence[Share], *, plain: bool) -> Iterator[Share]:
    """With `plain`, tensors are the local ones, of which fairseq2 joins all in their first dimension."""
    if not plain or len(shares) == 1:
        yield from shares
        return
    held = [_facts(share.source) for share in shares]
    names = dict.fromkeys(name for those in held for name in those)
    extents: list[dict[str, Extent]] = [{} for _ in shares]
    for name in names:
        shapes = [those[name].shape if name in those else (0,) for those in held]
        if all(shapes) and not any(name in share.extents for share in shares):
            for own, extent in zip(extents, _rows(shapes), strict=True):
                own[name] = extent
    for share, own, those in zip(shares, extents, held, strict=True):
        yield Share(share.source, share.label, {**{name: own[name] for name in own if name in those}, **share.extents})


def _copies_in_rows(shares: Sequence[Share]) -> Iterator[str]:
    """A buffer that all have is not told from a shard. Where it was one, its shape will not fit."""
    if len(shares) < 2:
        return
    known = [name for name in shares[0].extents if name not in shares[0].source.shards]
    held = [set(share.source.tensors) for share in shares]
    alike = [
        name
        for name in known
        if all(name in those for those in held) and len({share.source.sum_of(name) for share in shares}) == 1
    ]
    if alike:
        more = ", ..." if alike[3:] else ""
        yield (
            f"{', '.join(alike[:3])}{more}: the same on all {len(shares)} ranks, and joined in rows nevertheless, as "
            "fairseq2 does"
        )


def _facts(source: ArchiveSource) -> dict[str, TensorFacts]:
    """Of tied tensors, too."""
    return {**source.tensors, **{name: source.tensors[first] for name, first in source.ties.items()}}


def _rows(shapes: Sequence[tuple[int, ...]]) -> Iterator[Extent]:
    """As `torch.cat` takes them, for which (0,) goes with any shape."""
    below = next((shape[1:] for shape in shapes if shape != (0,)), ())
    starts = [0, *accumulate(shape[0] for shape in shapes)]
    for start, shape in zip(starts, shapes, strict=False):
        boxes = (Box((start, *(0,) * len(below)), shape, (0,) * len(shape)),) if all(shape) else ()
        yield Extent((starts[-1], *below), boxes)


def _parts_of(shares: Sequence[Share], part: str | None, folder: Folder) -> dict[str, Any]:
    """The state in the files, by part; they hold that one, or have the parts as their keys.

    What each rank had of its own, such as random streams, comes as parts of its own, `rng_0`, `rng_1`, ...
    """
    joined = JoinedSource(shares, where=_where(folder))
    whole = origins(joined)
    if part is None and not isinstance(whole, Mapping):
        raise ValueError("it is no state with parts by name")
    found: dict[str, Any] = {}
    for key, tree in ({part: whole} if part is not None else whole).items():
        below = list(joined.differ) if part is not None else _below(str(key), joined.differ)
        if not below:
            found[key] = tree
            continue
        sharded = part in _JOINED if part is not None else key in _JOINED
        sharded |= any(_below("" if part is not None else str(key), share.extents) for share in shares)
        if sharded:
            name = below[0] if part is None else f"{part}.{below[0]}"
            raise _not_joined(name, joined.differ[below[0]], folder)
        for number, share in enumerate(shares):
            own = origins(share.source)
            if part is not None or key in own:
                found[f"{key}_{number}"] = own if part is not None else own[key]
    return found


def _below(key: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if not key or name == key or name.startswith(f"{key}.")]


def _not_joined(name: str, label: str, folder: Folder) -> CheckpointLoadError:
    return CheckpointLoadError(
        f"{_where(folder)} cannot be joined: {name} in {label} is another one than in the files before it, and nothing "
        "says how they join, as DTensors do: load it in a job of that size with the program that saved it, and save it "
        "whole; or convert other parts alone (--part, parts=)"
    )


def _where(folder: Folder) -> str:
    return f"{folder.key or 'the folder'} at {folder.storage.url}"
