"""The main job on S3, beside a real server: save, kill in the middle of a save, resume on another mesh, keep the last
ones, the whole model in one file, every byte verified; what the killed one had begun to put is swept, while uploads of
other programs go on."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.format.layout import MANIFEST
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.storage import S3Storage, Transfers
from shardckpt.storage.base import Buffer
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.pool import ProcessPool
from tests.distributed.jobs import Job, Layout, differences, keep_reference
from tests.run.making import is_whole, walk
from tests.storage.s3server import S3Server

pytestmark = pytest.mark.s3

LAST_SAVED, KILLED_AT, LAST = 3, 4, 6
PART = 5 << 20
"""Bytes of a part of an upload, the least that S3 allows."""


class Deadly(StorageWrapper):
    """Kills its process when it has begun the upload of the file of its rank, and put a part of it perhaps."""

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        deadly = key.startswith(f"step_{KILLED_AT}/") and "/rank_" in key
        return super().put(key, self._begin_and_die(parts) if deadly else parts)

    def _begin_and_die(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        whole = memoryview(b"".join(parts))
        assert len(whole) > 2 * PART
        yield whole[: 2 * PART]
        os.kill(os.getpid(), signal.SIGKILL)


def storage_of(server: S3Server, url: str) -> S3Storage:
    return server.storage(url, transfers=Transfers(whole_nbytes=PART, part_nbytes=PART))


def train(rank: int, world_size: int, folder: Path, server: S3Server, url: str, layout: Layout, beside: Path) -> None:
    """Until the last rank is killed while it writes its part of step 4; what was saved before lies beside, as torch has
    it."""
    job, storage = Job(layout, seed=0), storage_of(server, url)
    last = rank == world_size - 1
    with sc.CheckpointManager(
        Deadly(storage) if last else storage, sc.Gangs.from_mesh(job.mesh), keep=sc.KeepLast(2)
    ) as manager:
        for step in range(1, KILLED_AT + 1):
            job.train_step()
            if step == LAST_SAVED:
                keep_reference(beside / "saved.pt", job.gathered())
            ballast = {"ballast": torch.zeros(11 << 18)} if step == KILLED_AT and last else {}
            manager.save(step, {**job.state(), **ballast}).result()


def resume(
    rank: int, world_size: int, folder: Path, server: S3Server, url: str, layout: Layout, beside: Path
) -> tuple[int, list[str]]:
    """(the step that was found, what is not as it was saved); exports its model to another place, then trains and
    saves on, at last with the whole model.

    By URL and options, as programs do it."""
    job = Job(layout, seed=1)
    gangs, options = sc.Gangs.from_mesh(job.mesh), dict(server.options)
    with sc.CheckpointManager(url, gangs, keep=sc.KeepLast(2), storage_options=options) as manager:
        info = manager.resume(job.state())
        assert info is not None
        differing = list(differences(torch.load(beside / "saved.pt", weights_only=False), job.gathered()))
        with sc.CheckpointManager(exported(url), gangs, storage_options=options) as other:
            other.begin_checkpoint(info.step)
            other.save_consolidated_fsdp_model(job.module)
            other.commit_checkpoint()
        for step in range(info.step + 1, LAST):
            job.train_step()
            manager.save(step, job.state()).result()
        job.train_step()
        keep_reference(beside / "last.pt", job.gathered())
        manager.begin_checkpoint(LAST)
        manager.save_state(job.state())
        manager.save_consolidated_fsdp_model(job.module)
        manager.commit_checkpoint()
        return info.step, differing


def exported(url: str) -> str:
    """Where the model goes that a run was resumed from."""
    return f"{url}-model"


def keys_of(storage: S3Storage, step: int) -> set[str]:
    """What the record of a committed step names, and the record."""
    folder, record = Catalog(storage).record(step)
    return {f"{folder}/{MANIFEST}", *(f"{folder}/{file.name}" for file in record.files)}


def whole_model(storage: S3Storage, step: int) -> dict[str, torch.Tensor]:
    """As somebody without shardckpt reads it."""
    (key,) = [key for key in keys_of(storage, step) if key.endswith("/model.pt")]
    content = torch.load(BytesIO(storage.read(key)), weights_only=True)
    return {f"model {name}": tensor for name, tensor in content["model"].items()}


def model_in(file: Path) -> dict[str, torch.Tensor]:
    """Of what `keep_reference` has written."""
    return {name: tensor for name, tensor in torch.load(file).items() if name.startswith("model ")}


def found_by_verify(server: S3Server, url: str) -> list[tuple[int | None, str, tuple[str, ...]]]:
    """(step, verdict, damaged files) of each that is there."""
    report = sc.verify(url, storage_options=server.options)
    assert all(step.checked_nbytes == step.nbytes > 0 for step in report.steps)
    return [(step.step, step.verdict, tuple(problem.file for problem in step.problems)) for step in report.steps]


@contextmanager
def one_byte_flipped(server: S3Server, path: str) -> Iterator[None]:
    """In the middle of an object, until the block ends; by the client of the server, which replaces what is there."""
    content: bytes = server.file_system.cat_file(path)
    middle = len(content) // 2
    server.file_system.pipe_file(path, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    yield
    server.file_system.pipe_file(path, content)


def check_that_verify_finds_damage(server: S3Server, url: str, steps: list[int]) -> None:
    """Nothing in the steps as they are; and in one of them a byte that was flipped in the largest of its files."""
    sound = [(step, "COMPLETE", ()) for step in steps]
    assert found_by_verify(server, url) == sound
    folder, record = Catalog(storage_of(server, url)).record(steps[1])
    harmed = max(record.files, key=lambda file: file.nbytes).name
    with one_byte_flipped(server, f"{url}/{folder}/{harmed}"):
        assert found_by_verify(server, url) == [sound[0], (steps[1], "DAMAGED", (harmed,)), *sound[2:]]
    assert found_by_verify(server, url) == sound


class Foreign:
    """An upload of another program, by a client of its own: a part of it is there, and another one still to come."""

    def __init__(self, server: S3Server, path: str) -> None:
        self._call, self._cat = server.file_system.call_s3, partial(server.file_system.cat_file, path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        self._place = {"Bucket": bucket, "Key": key}
        self._upload = {**self._place, "UploadId": self._call("create_multipart_upload", **self._place)["UploadId"]}
        self._parts = [self._put(1, b"1" * PART)]

    def _put(self, number: int, content: bytes) -> dict[str, object]:
        answer = self._call("upload_part", **self._upload, PartNumber=number, Body=content)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def finish(self) -> bool:
        """Whether it could be, and what it put is all there."""
        self._parts.append(self._put(2, b"2"))
        self._call("complete_multipart_upload", **self._upload, MultipartUpload={"Parts": self._parts})
        return bool(self._cat() == b"1" * PART + b"2")


def uploads_of(storage: S3Storage) -> list[str]:
    return [key for key, _ in storage.list_uploads()]


def sweep(storage: S3Storage) -> list[str]:
    """What a later job does that lives for longer than its patience."""
    now = [0.0]
    attempts = DeadAttempts(Catalog(storage), grace=timedelta(seconds=100), clock=lambda: now[0])
    assert attempts.tidy() == []
    now[0] = 99.0
    assert attempts.tidy() == []
    now[0] = 200.0
    return attempts.tidy()


@pytest.mark.crash
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(1), Layout(2)),
        (Layout(2), Layout(2, 2)),
        pytest.param(Layout(2, 2), Layout(1), marks=pytest.mark.larger),
    ],
    ids=str,
)
def test_save_kill_resume_on_another_mesh_keep_the_last_export_and_verify(
    server: S3Server, ranks: ProcessPool, tmp_path: Path, before: Layout, after: Layout
) -> None:
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    # In the run, in a folder of a step, and beside the run under a name that begins alike.
    inside = ["exports/large", f"step_{KILLED_AT}/of somebody/large"]
    foreign = [Foreign(server, path) for path in (*(f"{url}/{key}" for key in inside), f"{url}-of-another/rank_0.pt")]
    terms = replace(server), url  # without the client that it may have, which cannot go to other processes
    *alive, dead = ranks.run_settled(before.ranks, train, *terms, before, tmp_path, timeout=60)
    assert "killed by signal 9" in str(dead.error)
    assert all(isinstance(outcome.error, sc.CheckpointSaveError) for outcome in alive), alive
    storage = storage_of(server, url)
    assert Catalog(storage).steps() == [LAST_SAVED - 1, LAST_SAVED]
    # Where nobody is left to clean up, the upload lies there unfinished.
    ours = [key.rpartition("/")[2] for key in uploads_of(storage) if key not in inside]
    assert ours == (["rank_0.pt"] if not alive else [])

    found = ranks.run(after.ranks, resume, *terms, after, tmp_path, timeout=60)
    assert found == [(LAST_SAVED, [])] * after.ranks
    kept = [LAST_SAVED, LAST - 1, LAST]  # the first is what it resumed from
    assert Catalog(storage).steps() == kept
    assert all(is_whole(storage, step) for step in kept)
    assert list(differences(model_in(tmp_path / "last.pt"), whole_model(storage, LAST))) == []
    other = storage_of(server, exported(url))
    assert list(differences(model_in(tmp_path / "saved.pt"), whole_model(other, LAST_SAVED))) == []
    assert found_by_verify(server, exported(url)) == [(LAST_SAVED, "PARTIAL", ())]  # a model, and no more

    swept = sweep(storage)
    assert all(name.startswith(f"step_{KILLED_AT}/") for name in swept)
    assert bool(swept) == (not alive)
    assert set(walk(storage)) == {key for step in kept for key in keys_of(storage, step)}  # the bytes are gone, too
    assert uploads_of(storage) == inside
    assert all(upload.finish() for upload in foreign)
    check_that_verify_finds_damage(server, url, kept)
