"""What every command prints of a run: sound, partly there, damaged, or of another program; on a disk, or on S3.

`python -m tests.cli.shown` writes it anew into `golden/`; the tests hold the commands against it.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import shardckpt as sc
from shardckpt.cli.commands import app
from shardckpt.format.layout import MANIFEST
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from tests.storage import s3server
from tests.tools.making import save, small_state

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("local", "s3")


@dataclass(frozen=True)
class Stage:
    """Where a run lies, and where commands may write."""

    url: str
    to: str
    page: Path
    storage: Storage


def sound(stage: Stage, scratch: Path) -> None:
    with sc.CheckpointManager(stage.storage) as checkpoints:
        for step in (1, 7):
            checkpoints.save(step, small_state(step)).result()
        checkpoints.save_score(0.5, step=7)
        checkpoints.pin(1)


def partial(stage: Stage, scratch: Path) -> None:
    """A step of the model alone, and one that was never committed."""
    with sc.CheckpointManager(stage.storage) as checkpoints:
        checkpoints.save(1, {"model": small_state(1)["model"]}).result()
    save(stage.storage, 2)
    stage.storage.delete([f"step_2/{MANIFEST}"])


def damaged(stage: Stage, scratch: Path) -> None:
    """A sound step, one with a wrong byte in a tensor, one with a damaged record, one that lacks a file."""
    save(stage.storage, 1, 2, 3, 4)
    weight = bytes(small_state(2)["model"]["weight"].numpy())
    for key, what in ((_file(stage, 2, "model.pt"), weight), (f"step_3/{MANIFEST}", b"attempt")):
        content = bytearray(stage.storage.read(key))
        content[content.index(what)] ^= 1
        stage.storage.delete([key])
        stage.storage.put(key, [bytes(content)])
    stage.storage.delete([_file(stage, 4, "rank_0.pt")])


def _file(stage: Stage, step: int, name: str) -> str:
    entry = Catalog(stage.storage).entry(step)
    return f"{entry.attempt_folder}/{name}"


def foreign(stage: Stage, scratch: Path) -> None:
    """What a script wrote with `torch.save`."""
    torch.save({"model": small_state(1)["model"], "epoch": 3}, scratch / "state.pt")
    stage.storage.put("state.pt", [(scratch / "state.pt").read_bytes()])


STATES: dict[str, Callable[..., None]] = {
    "sound": sound,
    "partial": partial,
    "damaged": damaged,
    "foreign": foreign,
}


def commands(state: str) -> Iterator[list[str]]:
    """All commands that a checkpoint is given to. <run> and <to> are put in later; they are held in this order."""
    step = {"sound": 7, "partial": 2, "damaged": 2, "foreign": 1}[state]
    yield ["ls", "<run>"]
    yield ["verify", "<run>"]
    yield ["inspect", "<run>"]
    yield ["plan", "<run>", "--mesh", "dp=2"]
    yield ["diff", f"<run>/step_{step}", "<run>/step_1"]
    yield ["repair", "<run>", "--step", str(step)]
    yield ["prune", "<run>", "--keep-last", "1"]
    yield ["runs", "<run>"]
    yield ["report", "<run>", "--keep-last", "1"]
    yield ["cp", "<run>", "<to>/copy", "--all"]
    yield ["convert", "<run>", "<to>/converted"]
    yield ["export", "<run>", "<to>/exported", "--step", str(step)]
    yield ["average", f"<run>/step_{step}", f"<run>/step_{step}", "<to>/averaged"]
    yield ["merge-lora", "<run>", "<to>/merged", "--step", str(step)]
    yield ["pin", "<run>", "--step", str(step)]
    yield ["unpin", "<run>", "--step", str(step)]
    if state == "sound":  # of a place, not of what lies there
        yield ["doctor", "<run>", "--mb", "1"]
        yield ["bench", "<run>", "--mb", "1", "--rounds", "1"]


WITHOUT_JSON = {"pin", "unpin"}


def sections(state: str) -> list[list[str]]:
    """All commands as they are given, those that report also with --json: to a place of its own, what they write."""
    told = []
    for command in commands(state):
        told.append(command)
        if command[0] not in WITHOUT_JSON:
            told.append([*(word.replace("<to>/", "<to>/json-") for word in command), "--json"])
    return told


def shown(stage: Stage, command: list[str]) -> str:
    """A command, what it prints, and its status."""
    to_page = ["--to", str(stage.page)] if command[0] == "report" and "--json" not in command else []
    arguments = [word.replace("<run>", stage.url).replace("<to>", stage.to) for word in [*command, *to_page]]
    result = CliRunner().invoke(app, arguments, env={"NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if "--json" in command and result.stdout:
        told = pformat(_steady(json.loads(result.stdout), stage), width=118, compact=True, sort_dicts=False)
    else:
        told = _masked(result.stdout, stage)
    lines = [f"$ shardckpt {' '.join(command)}", *(line.rstrip() for line in told.splitlines())]
    lines += [f"! {line.rstrip()}" for line in _masked(result.stderr, stage).splitlines()]
    text = "\n".join([*lines, f"= {result.exit_code}"]) + "\n"
    if command[0] in ("doctor", "bench"):
        text = re.sub(r"  +", "  ", re.sub(r"(?<![\w<])\d[\d.,]*(?=\D)", "<n>", text))
    if command[0] == "doctor" and "--json" not in command:  # what it finds, and so what it advises, is the machine's
        text = re.sub(r"(?m)^(?:ok|note) +([^:\n]+):.*$", r"<level> \1: <found>", re.sub(r"(?m)^  .*\n", "", text))
    return text


_VOLATILE = {"created", "made", "seconds", "rate", "versions", "saved", "ratio"}
_OF_MACHINE = {"name", "level", "unit"}


def _steady(value: Any, stage: Stage) -> Any:
    """Without what is other each time."""
    if isinstance(value, dict):
        if value.keys() >= _OF_MACHINE:
            return {"name": value["name"], "unit": value["unit"]}
        return {
            key: "<...>" if key in _VOLATILE and inner is not None else _steady(inner, stage)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_steady(inner, stage) for inner in value]
    return _masked(value, stage) if isinstance(value, str) else value


def _masked(text: str, stage: Stage) -> str:
    for place, name in ((stage.url, "<run>"), (stage.to, "<to>"), (str(stage.page), "<page>")):
        text = text.replace(place, name)
    text = re.sub(r"\b[0-9a-f]{20}\b", "<id>", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|\+00:00| UTC)", "<time>", text)
    text = re.sub(r"<time>; \S+ .*", "<time>; <versions>", text)
    text = re.sub(r" *\b\d+ (s|min)\b( +)", r"  <age>\2", text)
    text = re.sub(r"\bage( +)", r"age  ", text)
    return re.sub(r"[\d.]+ .?B/s", "<rate>", text)


@contextmanager
def staged(kind: str, state: str, scratch: Path, server: s3server.S3Server | None) -> Iterator[Stage]:
    """A run in this state. On S3 commands share the client of the tests: making one for each takes 0.2 s."""
    scratch.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "local":
            run = str(scratch / "run")
            stage = Stage(run, str(scratch / "out"), scratch / "page.html", LocalStorage(run))
        else:
            assert server is not None
            place = f"s3://{server.bucket}/{uuid.uuid4().hex}"
            run = f"{place}/run"
            stage = Stage(run, f"{place}/out", scratch / "page.html", server.storage(run))
            shared = server.file_system
            patch.setattr("fsspec.url_to_fs", lambda url, **options: (shared, url.removeprefix("s3://")))
        STATES[state](stage, scratch)
        (scratch / "out").mkdir()
        yield stage
        if server is not None and kind == "s3":
            server.file_system.rm(place, recursive=True)


def golden(kind: str, state: str) -> Path:
    return GOLDEN / f"{state}-{kind}.txt"


def main() -> None:
    """Write them all."""
    with s3server.running() as server, TemporaryDirectory() as scratch:
        server.make_bucket()
        for kind in KINDS:
            for state in STATES:
                with staged(kind, state, Path(scratch) / f"{kind}-{state}", server) as stage:
                    golden(kind, state).write_text("\n".join(shown(stage, each) for each in sections(state)))


if __name__ == "__main__":
    sys.exit(main())
