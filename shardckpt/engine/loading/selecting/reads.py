"""What a rank would read of which files, from the record and what it wants; no file is opened. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.integrity import Region, runs_of
from shardckpt.engine.loading.needs import needs_of, tree_ranks_of
from shardckpt.engine.loading.selecting.report import FileReads, RankReads
from shardckpt.engine.loading.sources import Chunk, Sources
from shardckpt.format.index import ITEMSIZE, StoredRecord
from shardckpt.format.manifest import Manifest
from shardckpt.format.record.columns import FilesByName


def reads_of(fit: Fit, sources: Sources, manifest: Manifest, rank: int) -> RankReads:
    """All that this rank would read of a step."""
    nbytes, ranges = Counter[str](), Counter[str]()
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for position, file, _, region, _ in needs_of(fit, sources):
        wanted = fit.tensors[position]
        if position not in shapes:
            terms: dict[str, Any] = {"whole": wanted.is_whole, "parts": wanted.boxes}
            shapes[position] = _shapes(sources.chunks(wanted.name, wanted.rule, **terms))
        count = math.prod(region.lengths) * ITEMSIZE[wanted.dtype]
        nbytes[file] += count
        ranges[file] += _ranges(wanted.dtype, shapes[position][file], region) if count else 0
    trees = {file for saver in tree_ranks_of(fit, sources) for file in sources.trees_of(saver)}
    named = FilesByName(manifest.files)
    about = [entry.index for name in nbytes if (entry := named.get(name))]
    about += [entry.tree for name in trees if (entry := named.get(name))]
    files = tuple(FileReads(file, ranges[file], nbytes[file]) for file in sorted({*nbytes, *trees}))
    return RankReads(rank, files, sum(extent[1] for extent in about if extent is not None))


def _shapes(chunks: Sequence[Chunk]) -> dict[str, tuple[int, ...]]:
    """By file: the shape in which it has its part of a tensor, which may be made of several boxes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, box in chunks:
        extent = tuple(at + length for at, length in zip(box.local, box.lengths, strict=True))
        shapes[file] = tuple(map(max, shapes[file], extent)) if file in shapes else extent
    return shapes


def _ranges(dtype: str, shape: tuple[int, ...], region: Region) -> int:
    record = StoredRecord(dtype, shape, 0, math.prod(shape) * ITEMSIZE[dtype], 0)
    return len(runs_of(record, region).offsets)
