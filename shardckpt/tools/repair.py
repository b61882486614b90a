"""Repair: bring back a lost or damaged record, or take a damaged step out of the way. A dry run unless told otherwise.

- A record with a flipped bit is mended; its SHA-256 proves that it is again what was written.
- A record that is lost, or damaged beyond that, is made anew from what the files say of themselves, all of which must
  be sound to the last byte. That none is missing is proven by another step of the run whose files are just like these.
  In a run with `blobs/` such a witness is needed, and that but one content of the shared files can be meant.
  Without such a witness a person must say so: how many ranks there were (`ranks`), and that what is there is all.
- An attempt that was written and never committed becomes a checkpoint in the same way, by the engine's own commit.
- A step with damaged files cannot be mended: its folder gets a name that is never offered; nothing of it is deleted.

The record is put in force by one atomic operation after everything else has been checked: a crash before it leaves what
was there. Nobody may be saving or deleting this step meanwhile. In any one thread of one process; no process group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, InvalidOperationError
from shardckpt.format.layout import BLOBS, MANIFEST, SET_ASIDE, new_attempt, step_folder
from shardckpt.format.manifest import Manifest, decode_manifest, encode_manifest
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.tools.contents import Found, leftovers
from shardckpt.tools.place import Where, opened
from shardckpt.tools.repairing.mend import mend_record
from shardckpt.tools.report import StepReport
from shardckpt.tools.verify import verify_step

Kind = Literal["nothing", "mend record", "rebuild record", "commit attempt", "set aside"]


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What is to be done, or was."""

    url: str
    step: int
    kind: Kind
    what: str
    """For people."""
    lost: tuple[str, ...] = ()
    """What will not come back."""
    applied: bool = False
    after: StepReport | None = None
    """What `verify` finds afterwards, if it was applied and the step is in force."""


@dataclass(frozen=True, slots=True)
class _Plan:
    report: RepairReport
    manifest: Manifest | None = None
    folder: str = ""
    target: str = ""
    """The name that the folder gets."""
    old: bytes | None = None
    """The damaged record, to be kept beside the new one."""


def repair(
    where: Where,
    *,
    step: int,
    apply: bool = False,
    ranks: int | None = None,
    attempt: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> RepairReport:
    """Say what can be done for one step, and with `apply` do it.

    `CheckpointNotFoundError` if there is no trace of it; `CheckpointDamagedError` if no record can be made, and why;
    `InvalidOperationError` if `ranks` or `attempt` must be said first. Then nothing was changed. Errors of the place as
    in `verify`.

    Args:
        where: the run; a path, URL or `Storage`.
        apply: do it; else nothing is changed.
        ranks: how many ranks saved the step, for a record that is made anew without a witness. It also says that no
            file is missing, which then nothing else can tell.
        attempt: of several attempts that did not commit, which.
        storage_options: for fsspec; never logged.
    """
    with opened(where, storage_options) as place:
        if place.folder or place.file:
            raise InvalidOperationError("repair wants the run, and the step by its number", step=step)
        storage = place.storage
        plan = _plan(storage, step, ranks, attempt)
        if not apply or plan.report.kind == "nothing":
            return plan.report
        _apply(storage, plan)
        entry = None if plan.report.kind == "set aside" else Catalog(storage).entry(step)
        after = None if entry is None else verify_step(storage, entry)
        return replace(plan.report, applied=True, after=after)


def _plan(storage: Storage, step: int, ranks: int | None, attempt: str | None) -> _Plan:
    try:
        entry = Catalog(storage).entry(step)
    except CheckpointNotFoundError:
        return _of_attempt(storage, step, ranks, attempt)
    try:
        Catalog(storage).record(entry)
    except CheckpointDamagedError as error:
        return _of_damaged_record(storage, entry, ranks, str(error))
    found = verify_step(storage, entry)
    if not found.problems:
        return _Plan(RepairReport(storage.url, step, "nothing", "the step is sound"))
    return _aside(storage, entry, f"its files are damaged: {'; '.join(map(str, found.problems))}")


def _of_damaged_record(storage: Storage, entry: Entry, ranks: int | None, why: str) -> _Plan:
    data = storage.read(entry.record_key)
    try:
        decode_manifest(data)
    except ValueError:
        mended = mend_record(data)
    else:  # it is whole, and lies in the folder of another step: which is meant only a person knows
        raise CheckpointDamagedError(why, step=entry.step)
    manifest = decode_manifest(mended) if mended is not None else None
    if manifest is not None and manifest.step == entry.step:
        what = f"{entry.record_key} has a damaged byte, which its SHA-256 tells how to mend"
        report = RepairReport(storage.url, entry.step, "mend record", what)
        return _Plan(report, manifest, entry.folder, old=data)
    folder, attempt = entry.folder, new_attempt()
    if not isinstance(storage, RenamingStorage):
        found = _only([f for f in leftovers(storage, []) if f.step == entry.step], entry.step, None)
        folder, attempt = found.folder, found.attempt or attempt
    try:
        return _anew(storage, Found(entry.step, folder, "committed", attempt), ranks, "rebuild record", data)
    except CheckpointDamagedError as error:
        return _aside(storage, entry, f"its record is damaged, and {error}")


def _of_attempt(storage: Storage, step: int, ranks: int | None, attempt: str | None) -> _Plan:
    """Of a step that is not in force: a record that is lost, or an attempt that did not commit."""
    those = [f for f in leftovers(storage, []) if f.step == step and f.standing == "uncommitted"]
    found = _only(those, step, attempt)
    if found.attempt is None:  # a folder with the step's own name
        return _anew(storage, replace(found, attempt=new_attempt()), ranks, "rebuild record")
    if isinstance(storage, RenamingStorage) and MANIFEST in storage.list(found.folder):
        return _of_written_record(storage, found)
    return _anew(storage, found, ranks, "commit attempt")


def _of_written_record(storage: Storage, found: Found) -> _Plan:
    """Of an attempt that had written its own record, and was not put in force any more."""
    assert found.step is not None
    entry = Entry(found.step, found.folder, found.folder)
    problems = verify_step(storage, entry).problems
    if problems:
        said = "; ".join(map(str, problems))
        raise CheckpointDamagedError(f"{found.folder} cannot be committed: {said}", step=found.step)
    what = f"{found.folder} is whole by its own record, and will be put in force as {step_folder(found.step)}"
    report = RepairReport(storage.url, found.step, "commit attempt", what)
    return _Plan(report, None, found.folder, step_folder(found.step))


def _only(those: list[Found], step: int, attempt: str | None) -> Found:
    named = [found for found in those if attempt is None or found.attempt == attempt]
    if not named:
        which = f"attempt {attempt} of " if attempt is not None else ""
        raise CheckpointNotFoundError(f"there is no trace of {which}step {step}", step=step)
    if len(named) > 1:
        raise InvalidOperationError(
            f"there are several attempts of step {step} ({', '.join(found.folder for found in named)}): say which, by "
            "its id (attempt=..., --attempt)",
            step=step,
        )
    return named[0]


def _anew(storage: Storage, found: Found, ranks: int | None, kind: Kind, old: bytes | None = None) -> _Plan:
    """A record from the files."""
    from shardckpt.tools.repairing.evidence import gather
    from shardckpt.tools.repairing.likeness import LOST_TO_LIKENESS, missing_beside_others, rebuild_like_another
    from shardckpt.tools.repairing.rebuild import LOST, rebuild

    step, attempt, folder = found.step, found.attempt, found.folder
    assert step is not None
    assert attempt is not None
    evidence = gather(storage, folder, step=step)
    manifest = rebuild_like_another(storage, evidence, step=step, attempt=attempt)
    lost: tuple[str, ...] = LOST_TO_LIKENESS
    if manifest is None or (ranks is not None and ranks != manifest.world_size):
        if any(name.endswith("/") for name in storage.list(BLOBS)):
            raise CheckpointDamagedError(
                f"no record can be made for {folder}: files that steps share lie in {BLOBS}/ of this run, and no other "
                "step has just such files as this one and shows which of them belong to it",
                step=step,
            )
        if ranks is None:
            raise InvalidOperationError(_ask(folder, evidence.owns), step=step)
        if missing := missing_beside_others(storage, evidence, step=step, ranks=ranks):
            raise CheckpointDamagedError(
                f"no record can be made for {folder}: other steps of {ranks} ranks also have {', '.join(missing)}",
                step=step,
            )
        manifest, lost = rebuild(evidence, step=step, ranks=ranks, attempt=attempt), LOST
    encode_manifest(manifest)  # or it could not be stored
    like = "; another step has just such files" if lost is LOST_TO_LIKENESS else ""
    doubt = f"; {len(evidence.copies)} other files are taken as they are" if evidence.copies else ""
    shared = sum(bool(file.blob) for file in manifest.files)
    like += f"; {shared} of them are shared with other steps" if shared else ""
    what = f"a record for {folder} from its {len(manifest.files)} files, saved by {manifest.world_size} ranks"
    return _Plan(RepairReport(storage.url, step, kind, f"{what}{like}{doubt}", lost), manifest, folder, old=old)


def _ask(folder: str, names: Collection[str]) -> str:
    return (
        f"the files of {folder} are sound ({', '.join(sorted(names)[:8])}{', ...' * (len(names) > 8)}), but none says "
        "whether these are all, and no other step of the run is just like it. If you know that they are, say how many "
        "ranks saved it (ranks=..., --ranks)"
    )


def _aside(storage: Storage, entry: Entry, why: str) -> _Plan:
    target = f"{SET_ASIDE}{step_folder(entry.step)}.{new_attempt()}"
    if not isinstance(storage, RenamingStorage):
        raise InvalidOperationError(
            f"{why}. On an object store a step cannot be set aside without copying it: bring the files back from a "
            "copy, or delete the step",
            step=entry.step,
        )
    what = f"{why}. {entry.folder} gets the name {target}, under which it is never offered; nothing is deleted"
    return _Plan(RepairReport(storage.url, entry.step, "set aside", what), None, entry.folder, target)


def _apply(storage: Storage, plan: _Plan) -> None:
    report, manifest, step = plan.report, plan.manifest, plan.report.step
    try:
        if manifest is None:
            assert isinstance(storage, RenamingStorage)
            storage.rename_folder(plan.folder, plan.target)
        elif report.kind == "commit attempt" or (report.kind == "rebuild record" and _is_remote(storage)):
            from shardckpt.engine.committing.commit import commit_attempt

            _keep(storage, plan, plan.folder)
            commit_attempt(storage, plan.folder, manifest, known=plan.old)
        else:
            _keep(storage, plan, plan.folder)
            storage.replace(f"{plan.folder}/{MANIFEST}", encode_manifest(manifest))
    except OSError as error:
        raise CheckpointError(f"step {step} was not repaired: {error}; look again with verify", step=step) from error


def _keep(storage: Storage, plan: _Plan, folder: str) -> None:
    """The damaged record stays, under a name that nothing reads."""
    if plan.old is not None:
        storage.put(f"{folder}/{MANIFEST}.damaged-{new_attempt()}", [plan.old])


def _is_remote(storage: Storage) -> bool:
    return not isinstance(storage, RenamingStorage)
