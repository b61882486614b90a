"""The show: trains, kills, resumes and compares. Runs in the process that a person started; needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shardckpt.demo.messages import (
    Built,
    Event,
    Finished,
    Forget,
    Job,
    Mesh,
    Resumed,
    Run,
    RunName,
    Saved,
    Stepped,
    Training,
    Writing,
)
from shardckpt.demo.ranks import Ranks
from shardckpt.demo.table import Leftover, Record, Results, judge, render
from shardckpt.format.layout import parse_aside, parse_step
from shardckpt.storage import Storage, open_storage, redact


@dataclass(frozen=True, slots=True)
class Options:
    """What can be changed, checked already; see `--help`."""

    training: Training
    mesh: Mesh
    others: tuple[Mesh, ...]
    save_every: int
    kill_at: int
    tolerance: float
    root: str | None
    s3: bool
    keep: bool
    forget: Forget
    deadline_s: float


def show(options: Options) -> bool:
    """Do everything and print it; True if all that must hold holds. `RanksFailedError` if a run did not end well."""
    began = time.monotonic()
    with work_folder(options) as folder, server(options) as root:
        results = Show(options, folder, root=root).perform()
        checks = judge(results)
        print()
        print(render(results, checks))
    good = all(check.holds for check in checks)
    print()
    print(f"{'All of it holds.' if good else 'NOT all of it holds.'} {time.monotonic() - began:.0f} s")
    return good


@contextlib.contextmanager
def work_folder(options: Options) -> Iterator[Path]:
    """A folder for jobs, events, logs and (without --root) checkpoints; removed at the end unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="shardckpt-demo-"))
    try:
        yield folder
    finally:
        if options.keep:
            print(f"\nkept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def server(options: Options) -> Iterator[str | None]:
    """The root that was given, or the bucket of a server that ends with the block, known to the ranks."""
    if not options.s3:
        yield options.root
        return
    from shardckpt.testing.servers import seaweed

    with seaweed.running() as started:
        before = {name: os.environ.get(name) for name in started.environment}
        os.environ.update(started.environment)
        try:
            print(f"SeaweedFS on {started.endpoint}")
            yield started.url
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


class Show:
    """One show on one work folder; each act is one start of torchrun."""

    def __init__(self, options: Options, folder: Path, *, root: str | None) -> None:
        self.options = options
        self.folder = folder
        self.root = f"{root.rstrip('/')}/{folder.name}" if root else str(folder / "checkpoints")
        self.acts = 2 + len(options.others)

    def perform(self) -> Results:
        options = self.options
        print(f"checkpoints in {redact(self.root)}")
        reference, interrupted = self._interrupt()
        leftover = find_leftover(self.root, options.kill_at)
        meshes = (options.mesh, *options.others)
        resumed = [self._resume(mesh, act=2 + i, saves=mesh is meshes[-1]) for i, mesh in enumerate(meshes)]
        return Results(
            reference=reference,
            interrupted=interrupted,
            resumed=resumed,
            kill_at=options.kill_at,
            save_every=options.save_every,
            last_step=options.training.steps,
            tolerance=options.tolerance,
            leftover=leftover,
        )

    def _interrupt(self) -> tuple[Record, Record]:
        """Train to the end without saving, then once more with saves until the ranks are killed in one of them.

        Both in one start of torchrun: it saves ten seconds. What is resumed later runs in new processes.
        """
        kill_at = self.options.kill_at
        runs = (
            Run(name="reference"),
            Run(name="interrupted", save_every=self.options.save_every, stall_at=kill_at),
        )
        title = f"{self.options.mesh}: train; train again with saves, kill in the save of step {kill_at}"
        records = self._play(runs, self.options.mesh, act=1, title=title)
        return records["reference"], records["interrupted"]

    def _resume(self, mesh: Mesh, *, act: int, saves: bool) -> Record:
        run = Run(
            name="resumed",
            resume=True,
            save_every=self.options.save_every if saves else 0,
            forget=self.options.forget,
        )
        same = "the same mesh" if mesh == self.options.mesh else "another mesh"
        title = f"{mesh}: resume on {same}" + (", and save on" if saves else "")
        return self._play((run,), mesh, act=act, title=title)["resumed"]

    def _play(self, runs: tuple[Run, ...], mesh: Mesh, *, act: int, title: str) -> dict[RunName, Record]:
        """One start of torchrun, from its first event to its end or its killing."""
        folder = self.folder / f"act_{act}"
        job = Job(
            training=self.options.training,
            mesh=mesh,
            runs=runs,
            root=self.root,
            events=str(folder / "events.jsonl"),
            deadline_s=self.options.deadline_s,
        )
        records: dict[RunName, Record] = {run.name: Record(mesh) for run in runs}
        print(f"\n{act}/{self.acts} {title}")
        began = time.monotonic()
        with new_screen(self.options.training.steps, self.options.save_every) as screen, Ranks(job, folder) as ranks:
            for event in ranks.events():
                note(event, records)
                screen.show(event)
                if ready_to_kill(records) and not ranks.killed:
                    ranks.kill()
                    screen.say(f"killed every rank ({mesh.ranks}) with SIGKILL")
            screen.say(f"{time.monotonic() - began:.1f} s")
        return records


class PlainScreen:
    """Progress as plain lines: one for every few steps, and one for every save."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps = steps
        self.every = every
        self._saved: set[int] = set()

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def show(self, event: Event) -> None:
        """Called with every event of the ranks, in order."""
        if isinstance(event, Stepped):
            self.show_step(event)
        elif isinstance(event, Saved) and event.step not in self._saved:
            self._saved.add(event.step)
            self.say(f"saved step {event.step} in {event.total_s:.2f} s, training held up {event.stall_s * 1e3:.0f} ms")
        elif isinstance(event, Built) and event.run == "reference":
            size = f"{event.parameters / 1e6:.1f} M parameters, {event.text_nbytes / 1e6:.1f} MB of text"
            self.say(f"{size}, on {event.device}")
        elif isinstance(event, Resumed):
            self.say(f"resumed step {event.step} in {event.elapsed_s:.2f} s")
        elif isinstance(event, Writing):
            self.say(f"step {event.step} is being written: {event.key}")

    def show_step(self, event: Stepped) -> None:
        if event.step % self.every == 0:
            self.say(f"{event.run:<11} step {event.step:>3}/{self.steps}  loss {event.loss:.4f}")

    def say(self, line: str) -> None:
        print(f"    {line}", flush=True)

    def close(self) -> None: ...


class LiveScreen(PlainScreen):
    """Progress as one line that moves, in a terminal; saves and what else happens scroll by above it."""

    def __init__(self, steps: int, every: int) -> None:
        super().__init__(steps, every)
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("    {task.description:<11}"), BarColumn(bar_width=30), TextColumn("{task.fields[at]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), transient=True)
        self._progress.start()
        self._task = self._progress.add_task("starting", total=steps, at="")

    def show_step(self, event: Stepped) -> None:
        at = f"{event.step:>3}/{self.steps} loss {event.loss:.4f}"
        self._progress.update(self._task, description=event.run, completed=event.step, at=at)

    def say(self, line: str) -> None:
        self._progress.console.print(f"    {line}", markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def new_screen(steps: int, every: int) -> PlainScreen:
    """A moving line where there is a terminal and rich is installed, else plain lines."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        return LiveScreen(steps, every)
    return PlainScreen(steps, every)


def note(event: Event, records: dict[RunName, Record]) -> None:
    """Enter an event into the record of its run."""
    if isinstance(event, Stepped):
        records[event.run].losses[event.step] = event.loss
    elif isinstance(event, Saved):
        records[event.run].saves.append(event)
    elif isinstance(event, Writing):
        records["interrupted"].stalled = event
    elif isinstance(event, Resumed):
        records["resumed"].resumed = event
    elif isinstance(event, Finished):
        records[event.run].committed = tuple(event.committed)


def ready_to_kill(records: dict[RunName, Record]) -> bool:
    """When a step's writing has begun and stalled, and training has gone on past that step."""
    interrupted = records.get("interrupted")
    return (
        interrupted is not None
        and interrupted.stalled is not None
        and max(interrupted.losses, default=0) > interrupted.stalled.step
    )


def find_leftover(root: str, step: int) -> Leftover | None:
    """What the attempt to save this step has left in the root; None if there is no trace of it."""
    storage = open_storage(root)
    try:
        for name in storage.list():
            aside = parse_aside(name)
            if parse_step(name) == step or (aside is not None and aside.step == step):
                return Leftover(name.rstrip("/"), dict(_files_below(storage, name)))
    finally:
        storage.close()
    return None


def _files_below(storage: Storage, folder: str) -> Iterator[tuple[str, int]]:
    """Names (without folders) and sizes."""
    for name in storage.list(folder.rstrip("/")):
        if name.endswith("/"):
            yield from _files_below(storage, folder + name)
        else:
            yield name, storage.size(folder + name)
