"""Checkpoints that `from_pretrained` opens: config and tokenizer in each step, exports beside them, and loads."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

from shardckpt.engine.events.kinds import Deleted, Event
from shardckpt.engine.pending import PendingSave
from shardckpt.errors import InvalidStateError
from shardckpt.format.layout import CARBON_COPY
from shardckpt.integrations.huggingface.adapters import ADAPTER_CONFIG, adapter_names, export_adapter
from shardckpt.integrations.huggingface.parts import STATE_FILE
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.storage.base import Storage
from shardckpt.tools.export import export
from shardckpt.tools.moving.writing.told import Means
from shardckpt.tools.place import Where

_log = logging.getLogger(__name__)

_PART = ".part"
"""What a copy that is not whole yet ends with."""


def put_beside(manager: CheckpointManager, model: Any, processing_class: Any = None) -> None:
    """Put the model's config and the files of its tokenizer into `cc/` of the run, so that each step carries them.

    On rank 0, before the first save. Models without a config, and tokenizers that cannot be saved, have none. What
    cannot be put there is logged: an error of one rank alone would have the others wait for it.
    """
    with TemporaryDirectory(prefix="shardckpt-beside-") as name:
        for owner in (
            *getattr(model, "peft_config", {}).values(),
            getattr(model, "config", None),
            getattr(model, "generation_config", None) if getattr(model, "can_generate", bool)() else None,
            processing_class,
        ):
            if hasattr(owner, "save_pretrained"):
                owner.save_pretrained(name)
        for file in sorted(Path(name).rglob("*")):
            if file.is_file():
                key = f"{CARBON_COPY}/{file.relative_to(name).as_posix()}"
                try:
                    manager.storage.replace(key, file.read_bytes())
                except OSError as error:
                    _log.warning("%s does not go with the steps of %s: %s", key, manager.storage.url, error)


def from_pretrained(
    kind: Any,
    url: Where,
    *,
    step: int | None = None,
    storage_options: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Any:
    """`kind.from_pretrained` of a committed step, wherever it lies: `from_pretrained(AutoModelForCausalLM, "s3://...")`.

    One process. `kind` is a class of transformers or one of its `Auto...`; `kwargs` go to its `from_pretrained`. The
    step is exported into a temporary folder first. Errors as of `shardckpt.export`; `InvalidStateError` for a step of a
    model of PEFT.
    """
    with TemporaryDirectory(prefix="shardckpt-pretrained-") as name:
        report = export(url, Path(name) / "model", step=step, means=Means(storage_options=storage_options))
        if ADAPTER_CONFIG in report.copied:
            raise InvalidStateError(
                f"{report.source} is of a model with adapters: load it with adapter_only(model), or open its copy, "
                "<output_dir>/checkpoint-<step>, with PeftModel.from_pretrained"
            )
        return kind.from_pretrained(Path(name) / "model", **kwargs)


class Exporter:
    """Keeps `<folder>/checkpoint-<step>` beside each committed step, in a thread of its own. One per manager, rank 0.

    A copy that cannot be made is logged; the step does not depend on it. It goes when its step goes.
    """

    def __init__(self, manager: CheckpointManager, folder: Path, *, model: Any, prefix: str) -> None:
        self._storage: Storage = manager.storage
        self._folder, self._prefix = folder, prefix
        self._adapter = adapter_names(model)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Condition()
        self._left = 0
        for part in folder.glob(f".{prefix}*{_PART}"):  # of a job that was killed
            shutil.rmtree(part, ignore_errors=True)
        manager.subscribe(self._told)
        self._thread = threading.Thread(target=self._run, name="shardckpt-export", daemon=True)
        self._thread.start()

    def follow(self, pending: PendingSave) -> None:
        """Copy that step, when it is committed."""
        self._add(lambda: self._copy(pending))

    def complete(self, steps: Iterable[int]) -> None:
        """Copy those of these committed steps that have no copy: a job was killed before it had made it."""
        for step in steps:
            if not self._place(step).exists():
                self._add(partial(self._make, step))

    def wait(self) -> None:
        """Until all that was given is done."""
        with self._idle:
            self._idle.wait_for(lambda: not self._left)

    def close(self) -> None:
        """After the manager was closed, which tells of the last deletions."""
        self._jobs.put(None)
        self._thread.join()

    def _told(self, event: Event) -> None:
        if isinstance(event, Deleted) and not event.model_kept:
            self._add(partial(self._remove, event.step))

    def _add(self, job: Callable[[], None]) -> None:
        with self._idle:
            self._left += 1
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # whatever it is: who waits for the copies must not wait for ever
                _log.warning("a step has no copy for from_pretrained: %s: %s", type(error).__name__, error)
            finally:
                with self._idle:
                    self._left -= 1
                    self._idle.notify_all()

    def _copy(self, pending: PendingSave) -> None:
        pending.wait()
        if pending.failure() is None and not pending.skipped:
            self._make(pending.step)

    def _make(self, step: int) -> None:
        place = self._place(step)
        if (place / STATE_FILE).exists():
            _log.warning("%s was written by Trainer itself; it is left as it is", place)
            return
        part = place.with_name(f".{place.name}{_PART}")
        if self._adapter:
            export_adapter(self._storage, part, step=step, names=self._adapter)
        else:
            export(self._storage, part, step=step)
        self._remove(step)
        part.rename(place)

    def _remove(self, step: int) -> None:
        place = self._place(step)
        if not (place / STATE_FILE).exists():
            shutil.rmtree(place, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self._folder / f"{self._prefix}{step}"
