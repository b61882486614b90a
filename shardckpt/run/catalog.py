"""The committed steps of a run. All of it runs on rank 0 only, in any one thread; others are told.

A step counts if and only if its record is there. Nothing is remembered between two questions: other processes save,
replace and delete, so every answer is a fresh look.

On a file system a step may for a moment lie elsewhere: where two folders cannot be exchanged, a step that is saved
again is first renamed to `step_N.<attempt>.old`, then the new one to `step_N` (see the commit in the engine). Between
the two renames, and for good if the process dies there, the `.old` one is in force. Hence: `step_N.*.old` counts when
and only when `step_N` has no record. A reader that runs beside the replacement must look in this order: at `step_N`,
then for `.old`, then at `step_N` again. If the first look finds nothing, the first rename is done; if the second finds
nothing, `.old` has been removed by then, so the second rename is done, and the third look finds the new step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, Aside, is_attempt, parse_aside, parse_step, step_folder
from shardckpt.format.manifest import Manifest, decode_manifest
from shardckpt.run.requests import AT_ONCE, each
from shardckpt.storage.base import RenamingStorage, Storage


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a committed step lies."""

    step: int
    folder: str
    """The folder of its record; the file names in the record are relative to it."""
    attempt_folder: str
    """The folder that goes when this attempt's files go, whatever else is saved as this step: where its score lies.

    The same as `folder` on a file system, `step_N/<attempt>` on an object store.
    """

    @property
    def record_key(self) -> str:
        return f"{self.folder}/{MANIFEST}"


_Look: TypeAlias = Callable[[Sequence[int], Sequence[int]], tuple[list[Entry], Sequence[int]]]

_LOOKS = 10
"""At a root in which the newest steps vanish under one's eyes."""


class Catalog:
    """What is committed below a root, found anew by every call.

    Called on rank 0 only. A listing costs one request for the root and one for each step, many at once. What the
    storage itself cannot answer (`OSError`: no permission, no network) is raised as `CheckpointLoadError`, and is
    never taken for "not there".
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._renames = isinstance(storage, RenamingStorage)

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return [entry.step for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """The committed steps and where they lie, ascending by step."""
        return self._listed(lambda plain, steps: (self._found(plain, steps), []))[0]

    def entry(self, step: int) -> Entry:
        """Where this step lies, without listing the root in the usual case. `CheckpointNotFoundError` if nowhere."""
        try:
            found = self._look(step) or next(iter(self._look_again([step])), None)
        except OSError as error:
            raise self._cannot_look(error, step=step) from error
        if found is None:
            raise CheckpointNotFoundError(f"there is no committed checkpoint of step {step} in {self._url}", step=step)
        return found

    def has(self, step: int | None) -> bool:
        """Whether this step is committed; of None, whether any is."""
        if step is None:
            return self.latest() is not None
        try:
            return self.entry(step).step == step
        except CheckpointNotFoundError:
            return False

    def latest(self) -> Entry | None:
        """The committed step with the highest number; None if there is no step. Usually two requests."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[Entry]:
        """The committed steps, descending, for a search that mostly ends at the first: one request for the root, then
        one for each step that is looked at, which is not many more than are taken from this."""
        found, steps = self._listed(self._newest_of)
        yield from reversed(found)
        for at in range(0, len(steps), AT_ONCE):
            yield from reversed(self._found(block := steps[at : at + AT_ONCE], block))

    def _newest_of(self, _: Sequence[int], steps: Sequence[int]) -> tuple[list[Entry], Sequence[int]]:
        """The first that are committed, and the steps after these that have not been looked at."""
        found, at = list[Entry](), 0
        while at < len(steps) and not found:
            # The newest by name has mostly a record of its own: then no other need be looked at yet.
            block = steps[at : at + (AT_ONCE if at else 1)]
            at += len(block)
            found = self._found(block, block)
        return found, steps[at:]

    def _listed(self, look: _Look) -> tuple[list[Entry], Sequence[int]]:
        """What that finds of a listing, given the steps that may have folders of their own, and all, descending.

        Steps above the newest that it finds are saves under way; or a job has saved and pruned on meanwhile, and what
        was found is the past (2026-11: seen beside five saves a second, of which three were kept). The former are
        listed a second time as well.
        """
        gone: set[int] = set()
        for _ in range(_LOOKS):
            plain, replaced = _candidates(self._names())
            steps = sorted({*plain, *replaced}, reverse=True)
            found, rest = look(plain, steps)
            newest = found[-1].step if found else -1
            before, gone = gone, {step for step in steps if step > newest}
            if not gone or gone == before:
                break
        return found, rest

    def _names(self) -> list[str]:
        try:
            return self.storage.list()
        except OSError as error:
            raise self._cannot_look(error) from error

    def _found(self, plain: Sequence[int], steps: Collection[int]) -> list[Entry]:
        """Of these steps those that are committed, ascending; `plain` are those that may have folders of their own."""
        try:
            found = _present(each(self._look, plain))
            missing = set(steps) - {entry.step for entry in found}
            return sorted(found + self._look_again(missing), key=lambda entry: entry.step)
        except OSError as error:
            raise self._cannot_look(error) from error

    def full_steps(self) -> Iterator[int]:
        """The steps of which more than the model is there, descending; one record is read for each step passed over.

        A step whose record is damaged is among them: whoever loads it is told what is wrong with it.
        """
        for entry in self.newest_first():
            try:
                model_only = self.record(entry)[1].model_only
            except CheckpointNotFoundError:
                continue  # deleted since it was listed
            except CheckpointDamagedError:
                model_only = False
            if not model_only:
                yield entry.step

    def record(self, step: int | Entry) -> tuple[str, Manifest]:
        """The folder and the record of a step. File names in the record are relative to the folder.

        `CheckpointNotFoundError` if the step is not (or no longer) there, `CheckpointDamagedError` if what is there
        is not the whole record of this step, `CheckpointLoadError` if it cannot be read now.
        """
        entry = step if isinstance(step, Entry) else self.entry(step)
        for _ in range(2):  # a replacement beside this moves it twice: found here, it may be there, then here again
            try:
                return entry.folder, read_record(self.storage, entry)
            except CheckpointNotFoundError:
                entry = self.entry(entry.step)
        return entry.folder, read_record(self.storage, entry)

    @property
    def _url(self) -> str:
        return self.storage.url

    def _cannot_look(self, error: OSError, *, step: int | None = None) -> CheckpointLoadError:
        return CheckpointLoadError(
            f"cannot tell which checkpoints are in {self._url}: {error}; nothing was changed: "
            "see that the place can be reached and read, then try again",
            step=step,
        )

    def _look(self, step: int) -> Entry | None:
        """The step under its own name, by one request."""
        folder = step_folder(step)
        if self._renames:
            return Entry(step, folder, folder) if self._has_record(folder) else None
        names = self.storage.list(folder)
        if MANIFEST not in names:
            return None
        attempts = [name[:-1] for name in names if name.endswith("/") and is_attempt(name[:-1])]
        # Several: one in force, and leftovers or attempts under way. Then only the record can tell.
        attempt = attempts[0] if len(attempts) == 1 else self._recorded_attempt(step, folder)
        return Entry(step, folder, f"{folder}/{attempt}" if attempt else folder)

    def _look_again(self, steps: Collection[int]) -> list[Entry]:
        """Steps that have no record under their own name: the second and third look of the module's text."""
        if not steps or not self._renames:
            return []
        asides = [aside for name in self.storage.list() if (aside := _replaced(name))]
        return _present(each(lambda step: self._settle(step, [a for a in asides if a.step == step]), sorted(steps)))

    def _settle(self, step: int, asides: Sequence[Aside]) -> Entry | None:
        found = [Entry(step, aside.folder, aside.folder) for aside in asides if self._has_record(aside.folder)]
        return self._newest(found) if found else self._look(step)

    def _newest(self, entries: Sequence[Entry]) -> Entry:
        """Of several replaced ones of a step (each left by a crash of its own) the one that was committed last."""
        if len(entries) == 1:
            return entries[0]
        created = {}
        for entry in entries:
            try:
                created[entry] = read_record(self.storage, entry).created
            except (CheckpointDamagedError, CheckpointNotFoundError):
                created[entry] = ""
        return max(entries, key=lambda entry: (created[entry], entry.folder))

    def _recorded_attempt(self, step: int, folder: str) -> str | None:
        try:
            return read_record(self.storage, Entry(step, folder, folder)).attempt
        except (CheckpointDamagedError, CheckpointNotFoundError):
            return None

    def _has_record(self, folder: str) -> bool:
        try:
            self.storage.size(f"{folder}/{MANIFEST}")
        except FileNotFoundError:
            return False
        return True


def read_record(storage: Storage, entry: Entry) -> Manifest:
    """The record that lies where the entry says; errors as in `Catalog.record`."""
    return read_record_with_text(storage, entry)[1]


def read_record_with_text(storage: Storage, entry: Entry) -> tuple[bytes, Manifest]:
    """The same with its bytes, for who is to replace it and nothing that came after it.

    A record of another step than its folder's name says is refused as damaged, although somebody may just have
    renamed or copied the folder: storage does not turn one whole, digested record into another, but the training
    loop would go on counting from the name while the state is that of the record. Which is meant only a person knows.
    """
    where = f"{storage.url}/{entry.record_key}"
    try:
        text = storage.read(entry.record_key)
        manifest = decode_manifest(text)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{where}: there is no such checkpoint any more", step=entry.step) from error
    except OSError as error:
        raise CheckpointLoadError(
            f"{where}: the record of step {entry.step} cannot be read now: {error}", step=entry.step
        ) from error
    except ValueError as error:
        raise CheckpointDamagedError(
            f"{where}: the record of step {entry.step} is damaged: {error}. "
            "Load another step, or bring the file back from a copy",
            step=entry.step,
        ) from error
    if manifest.step != entry.step:
        raise CheckpointDamagedError(
            f"{where}: this is the record of step {manifest.step}, but it lies in the folder of step {entry.step}: "
            f"the folder was renamed or copied. Rename it to {step_folder(manifest.step)!r} to use it",
            step=entry.step,
        )
    return text, manifest


def _candidates(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of the names in the root: steps that have a folder of their own, and steps that were moved aside."""
    folders = [name for name in names if name.endswith("/")]
    plain = [step for name in folders if (step := parse_step(name)) is not None]
    return plain, [aside.step for name in folders if (aside := _replaced(name))]


def _replaced(name: str) -> Aside | None:
    aside = parse_aside(name) if name.endswith("/") else None
    return aside if aside is not None and aside.kind == "old" else None


def _present(found: Sequence[Entry | None]) -> list[Entry]:
    return [entry for entry in found if entry is not None]
