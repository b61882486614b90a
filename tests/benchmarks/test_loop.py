"""The training loop with saves: what is called when, what a bare save is, and that a wrong save gives no number."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from benchmarks.engines import ENGINES
from benchmarks.gauges import processor_s
from benchmarks.loop import EVERY, _bare, measure_loop
from benchmarks.measures import WrongContentError
from benchmarks.places import Place
from benchmarks.states import Shape, State, make

SAVES = 2
IN_PROCESS = ("shardckpt", "dcp.async_save, thread", "dcp.async_save, thread, stager kept", "torchsnapshot")


class Recorded(State):
    """Two small tensors that every update changes."""

    def __init__(self, log: list[str]) -> None:
        super().__init__({}, {"a": torch.ones(3), "b": torch.ones(())}, 0)
        self.log = log

    def compute(self) -> None:
        self.log.append("compute")

    def update(self) -> None:
        self.log.append("update")
        for tensor in self.tensors.values():
            tensor.add_(1)


class Copying:
    """An engine that keeps copies, made before the optimizer step or, if it is `late`, when the save is over."""

    def __init__(self, state: Recorded, root: Path, *, late: bool = False) -> None:
        self._state, self._root, self.late = state, root, late
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def start(self, step: int) -> Copied:
        self._state.log.append(f"start {step}")
        return Copied(self, step)

    def keep(self, step: int) -> None:
        self.kept[step] = {name: tensor.clone() for name, tensor in self._state.tensors.items()}
        folder = self.place(step).path
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(b"0123456789")

    def log(self, what: str) -> None:
        self._state.log.append(what)

    def save(self, step: int) -> None:
        raise NotImplementedError

    def load(self, step: int) -> None:
        self.log(f"load {step}")
        for name, tensor in self.kept[step].items():
            self._state.tensors[name].copy_(tensor)

    def place(self, step: int) -> Place:
        return Place(str(self._root / f"step_{step}"))

    def phases(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None: ...


class Copied:
    def __init__(self, engine: Copying, step: int) -> None:
        self._engine, self._step = engine, step

    def before_update(self) -> None:
        self._engine.log(f"before {self._step}")
        if not self._engine.late:
            self._engine.keep(self._step)

    def done(self) -> bool:
        return True

    def result(self) -> None:
        self._engine.log(f"result {self._step}")
        if self._engine.late:
            self._engine.keep(self._step)


def test_each_save_waits_for_the_one_before_and_the_optimizer_for_the_copy(tmp_path: Path) -> None:
    log: list[str] = []
    state = Recorded(log)
    values = measure_loop(SAVES * EVERY, state, Copying(state, tmp_path))
    rest = ["compute", "update"] * (EVERY - 1)
    loop = []
    for number in (3, 4):
        loop += [*([f"result {number - 1}"] * (number > 3)), f"start {number}", "compute", f"before {number}", "update"]
        loop += rest
    ends = log.index("result 4")
    assert log[ends - len(loop) : ends] == loop
    assert log[ends:][:2] == ["result 4", "load 3"], "the first of a loop is compared"
    assert log.count("update") == 3 * 2 + 6 * SAVES * EVERY
    assert (len(values["stall_s"]), len(values["bare_stall_s"]), values["file_nbytes"]) == (4, 4, 10.0)
    assert values["bare_file_nbytes"] == 4096, "whole pages"
    assert values["over_bare"] == pytest.approx(sum(values["saved_s"]) / sum(values["bare_s"]))
    assert [path.name for path in tmp_path.rglob("*")] == ["bare"]


def test_a_save_that_training_has_changed_gives_no_number(tmp_path: Path) -> None:
    state = Recorded([])
    with pytest.raises(WrongContentError, match="2 tensors differ"):
        measure_loop(EVERY, state, Copying(state, tmp_path, late=True))


def test_a_bare_save_is_the_state_as_it_was_before_the_update(tmp_path: Path) -> None:
    state = make(Shape("D", 0, layers=1, width=16), rank=0, mesh=None)
    expected = [local.clone() for _, local in state.locals()]
    gate = Event()
    with _bare(state, tmp_path) as bare, ThreadPoolExecutor(1) as trainer:
        bare._pool.submit(gate.wait)
        save = bare.start()
        updating = trainer.submit(save.before_update)
        try:
            with pytest.raises(TimeoutError):
                updating.result(timeout=0.1)  # nothing is copied yet
        finally:
            gate.set()
        updating.result()
        state.fill(1)
        save.result()
        (file,) = tmp_path.iterdir()
        content, at = file.read_bytes(), 0
        for tensor in expected:
            nbytes = tensor.nbytes
            found = torch.frombuffer(bytearray(content[at : at + nbytes]), dtype=tensor.dtype).view(tensor.shape)
            assert torch.equal(found, tensor)
            at += -(-nbytes // 64) * 64
        assert bare.forget() == len(content) == -(-at // 4096) * 4096
    assert not list(tmp_path.iterdir())


def test_processor_time_is_that_of_children_too_running_or_ended() -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = processor_s()
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = processor_s()
        child.communicate(b"\n")
    assert running - before > 0.25
    assert processor_s() - before > 0.25


def test_a_thread_that_ends_while_children_are_counted_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def read_text(path: Path, *args: Any) -> str:
        if path.name == "children":
            raise FileNotFoundError(path)
        return real(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert processor_s() > 0


@pytest.mark.leaks(threads=("asyncio_",), files=("socket:", "anon_inode:", "pipe:"), why="torchsnapshot")
@pytest.mark.parametrize("name", [name for name in IN_PROCESS if not ENGINES[name].missing])
def test_what_is_said_of_an_engines_syncs_is_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        synced.add("folders" if stat.S_ISDIR(os.fstat(number).st_mode) else "files")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    entry = ENGINES[name]
    engine: Any = entry.make(make(Shape("B", 0, count=3), rank=0, mesh=None), Place(str(tmp_path)), True)
    try:
        engine.start(0).result()
    finally:
        engine.close()
    told = {"all": {"files", "folders"}, "files, not folders": {"files"}, "nothing": set()}
    assert synced == told[entry.synced]
