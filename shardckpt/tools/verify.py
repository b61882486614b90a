"""Verify: is every byte of a checkpoint what was written, and is everything there that a job needs to go on?

One traversal for one step or a whole run. Committed steps are held against their records: the record's own SHA-256,
then presence and size of every file, then the digest of every file. What no record speaks of (attempts that did not
commit, checkpoints of others) is held against the CRCs that zip archives carry. No process group, no torch; any thread.

What cannot be found: a change of `score.txt`, which comes after the record; and, without a record, of bytes between the
records of an archive. What the system has in its page cache is read from there, not from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from shardckpt.format.layout import CARBON_COPY, MANIFEST, METADATA, METRICS, SCORE, parse_step, wanted_file
from shardckpt.format.manifest import FileEntry, Manifest
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.requests import each
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.tools.checking.archives import check_archive
from shardckpt.tools.checking.locate import locate
from shardckpt.tools.checking.summing import Stretch, sums
from shardckpt.tools.contents import Found, committed, files_below, foreign_folders, is_archive, leftovers
from shardckpt.tools.place import Place, Where, opened
from shardckpt.tools.report import ADDED, REBUILT, Problem, RunReport, StepReport, judge, parts_of, parts_of_files

_FEW = 16
"""Files of a step of which a file system tells the sizes sooner than threads begin."""

Told: TypeAlias = Callable[[int, int, int], None]
"""What hears of progress: the step, how many bytes of it have just been read, and how many it has."""


def verify(
    where: Where,
    *,
    step: int | None = None,
    quick: bool = False,
    told: Told = lambda step, nbytes, total: None,
    storage_options: Mapping[str, object] | None = None,
) -> RunReport:
    """Look at a run, one step, or a checkpoint of others, and say what is there and what is damaged.

    `CheckpointNotFoundError` if there is nothing, or no such step; `CheckpointLoadError` if the storage does not
    answer; `ValueError` or `ImportError` for a URL that cannot be opened. Damage raises nothing: it is reported.

    Args:
        where: a run, one step (`.../step_100`), one file, or a folder of another program; a path, URL or `Storage`.
        step: only this one, committed or not.
        quick: only records, presence and sizes; no file is read.
        told: hears of a committed step, how many bytes of it have just been read, and how many it has.
        storage_options: for fsspec; never logged.
    """
    with opened(where, storage_options) as place:
        if place.file:
            reports = [_of_file(place.storage, place.file, quick=quick)]
        else:
            reports = _reports(place, step, quick=quick, told=told)
        if not reports:
            missing = f"step {step}" if step is not None else "a checkpoint"
            raise CheckpointNotFoundError(f"there is no trace of {missing} in {place.storage.url}", step=step)
        return RunReport(place.storage.url, quick, tuple(reports))


def _reports(place: Place, step: int | None, *, quick: bool, told: Told) -> list[StepReport]:
    storage, folder = place.storage, place.folder
    entries = committed(storage) if step is None and not folder else _entries(storage, folder, step)
    others = [found for found in leftovers(storage, entries) if _is_meant(found, folder, step)]
    known: dict[str, int | Exception] = {}
    reports = [verify_step(storage, entry, quick=quick, known=known, told=told) for entry in entries]
    reports += [verify_leftover(storage, found, quick=quick) for found in others]
    if not reports and step is None:
        folders = [folder] if folder else foreign_folders(storage)
        reports = [_of_folder(storage, Found(parse_step(f), f, "foreign"), quick=quick) for f in folders]
    return sorted(reports, key=lambda report: (-1 if report.step is None else report.step, report.folder))


def _entries(storage: Storage, folder: str, step: int | None) -> list[Entry]:
    """The committed one that is meant, or none."""
    wanted = parse_step(folder) if folder else step
    if wanted is None:
        return []
    try:
        return [Catalog(storage).entry(wanted)]
    except CheckpointNotFoundError:
        return []


def _is_meant(found: Found, folder: str, step: int | None) -> bool:
    if folder:
        return found.folder == folder or found.folder.startswith(f"{folder}/")
    return step is None or found.step == step


def verify_step(
    storage: Storage,
    entry: Entry,
    *,
    quick: bool = False,
    known: dict[str, int | Exception] | None = None,
    told: Told = lambda step, nbytes, total: None,
) -> StepReport:
    """Of a committed step. `known`: sums of blobs that other steps have led to already, and where those are added that
    this one leads to."""
    try:
        folder, manifest = Catalog(storage).record(entry)
    except CheckpointDamagedError as error:
        return _without_record(storage, entry, str(error), quick=quick)
    problems, sound = _of_sizes(storage, folder, manifest.files)
    checked = 0
    if not quick:
        known = {} if known is None else known
        new = [file for file in sound if file.blob not in known]
        stretches = [Stretch(file.key_in(folder), 0, file.nbytes) for file in new]
        found = sums(storage, stretches, told=lambda nbytes: told(entry.step, nbytes, manifest.nbytes))
        known |= {file.blob: crc for file, crc in zip(new, found, strict=True) if file.blob}
        own = {file.name: crc for file, crc in zip(new, found, strict=True)}
        for file in sound:
            crc = own.get(file.name, known.get(file.blob, 0))
            if isinstance(crc, Exception):
                problems.append(Problem(file.name, f"cannot be read: {crc}"))
            elif crc != file.crc:
                problems.append(locate(storage, folder, file))
            checked += 0 if isinstance(crc, Exception) or file.name not in own else file.nbytes
    parts, others = _parts(manifest)
    notes = ("only the model was kept",) if manifest.model_only else ()
    found_problems = tuple(sorted(problems, key=lambda problem: problem.file))
    return StepReport(
        entry.step,
        folder,
        "committed",
        judge(parts, found_problems, whole=not manifest.model_only),
        parts,
        others,
        found_problems,
        notes + _unnamed(storage, entry, manifest),
        len(manifest.files),
        manifest.nbytes,
        checked,
        manifest.world_size,
        manifest.attempt,
        manifest.created,
    )


def _parts(manifest: Manifest) -> tuple[dict[str, bool], tuple[str, ...]]:
    own = {file.kind for file in manifest.files}
    keys = tuple("model" if part == manifest.model_key else part for part in manifest.parts)
    told = bool(manifest.metadata.keys() - {REBUILT, ADDED})
    return parts_of(keys, config=told or not own.isdisjoint((METADATA, CARBON_COPY)))


def _of_sizes(storage: Storage, folder: str, files: Sequence[FileEntry]) -> tuple[list[Problem], list[FileEntry]]:
    """What is wrong by presence and size alone, and the files with which nothing is."""

    def look(file: FileEntry) -> str:
        try:
            nbytes = storage.size(file.key_in(folder))
        except FileNotFoundError:
            return f"is missing: {file.blob}" if file.blob else "is missing"
        return "" if nbytes == file.nbytes else f"has {nbytes} bytes, but {file.nbytes} were written"

    few = len(files) <= _FEW and isinstance(storage, RenamingStorage)
    said = [look(file) for file in files] if few else each(look, files)
    problems = [Problem(file.name, what) for file, what in zip(files, said, strict=True) if what]
    return problems, [file for file, what in zip(files, said, strict=True) if not what]


def _unnamed(storage: Storage, entry: Entry, manifest: Manifest) -> tuple[str, ...]:
    """Files in its folder that its record does not name. On object stores other attempts lie beside it: not they."""
    folder = entry.attempt_folder if entry.attempt_folder != entry.folder else entry.folder
    named = {f"{entry.folder}/{file.name}" for file in manifest.files} | {entry.record_key}
    named |= {f"{folder}/{name}" for name in (SCORE, METRICS)}
    named |= {f"{entry.folder}/{wanted_file(file.name)}" for file in manifest.files if file.blob}
    extra = [name for name in files_below(storage, folder) if f"{folder}/{name}" not in named]
    return (f"the record does not name {', '.join(extra[:5])}{' and others' * (len(extra) > 5)}",) if extra else ()


def _without_record(storage: Storage, entry: Entry, why: str, *, quick: bool) -> StepReport:
    """Of a step whose record cannot be believed: its files by what they say of themselves."""
    found = Found(entry.step, entry.folder, "committed")
    report = _of_folder(storage, found, quick=quick)
    problems = (Problem(MANIFEST, why), *report.problems)
    return replace(report, problems=problems, verdict=judge(report.parts, problems, whole=False))


def verify_leftover(storage: Storage, found: Found, *, quick: bool = False) -> StepReport:
    """Of a folder without a record in force."""
    report = _of_folder(storage, found, quick=quick)
    notes = report.notes
    if found.standing == "uncommitted":
        has_record = MANIFEST in storage.list(found.folder)
        why = "its record is there, but it was never put in force" if has_record else "it has no record"
        notes = (f"not committed: {why}; it is never offered for loading", *notes)
    return replace(report, notes=notes, verdict="DAMAGED" if report.problems else "PARTIAL")


def _of_folder(storage: Storage, found: Found, *, quick: bool) -> StepReport:
    """Of files that no record speaks of."""
    beside = (MANIFEST, SCORE, METRICS)
    names = [name for name in files_below(storage, found.folder) if name.rpartition("/")[2] not in beside]
    keys = [f"{found.folder}/{name}" if found.folder else name for name in names]
    sizes = each(storage.size, keys)
    problems, notes, checked, tensors = list[Problem](), list[str](), 0, set[str]()
    for name, key, nbytes in zip(names, keys, sizes, strict=True):
        if not is_archive(name):
            continue
        archive = check_archive(storage, key, name, nbytes=nbytes, quick=quick)
        problems += archive.problems
        notes += [archive.note] if archive.note else []
        checked += archive.checked_nbytes
        tensors |= {box.name.partition(".")[0] for box in archive.own.index.boxes} if archive.own is not None else set()
    by_name = parts_of_files(tuple(names))
    by_tensor, _ = parts_of(tuple(sorted(tensors)), config=False)
    parts = {part: by_name[part] or by_tensor[part] for part in by_name}
    verdict = judge(parts, tuple(problems), whole=True)
    totals = (len(names), sum(sizes), checked, None, found.attempt)
    return StepReport(
        found.step, found.folder, found.standing, verdict, parts, (), tuple(problems), tuple(notes), *totals
    )


def _of_file(storage: Storage, name: str, *, quick: bool) -> StepReport:
    nbytes = storage.size(name)
    archive = check_archive(storage, name, name, nbytes=nbytes, quick=quick)
    parts = parts_of_files((name,))
    verdict = judge(parts, archive.problems, whole=True)
    notes = (archive.note,) if archive.note else ()
    return StepReport(
        None, "", "foreign", verdict, parts, (), archive.problems, notes, 1, nbytes, archive.checked_nbytes
    )
