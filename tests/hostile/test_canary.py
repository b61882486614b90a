"""Credentials that are looked for afterwards: in logs of all levels, reprs, errors and their causes, files, traces."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem

import shardckpt as sc
from shardckpt.storage import open_storage
from shardckpt.storage.objects import secrecy
from shardckpt.testing.servers.azurite import BlobServer
from shardckpt.testing.servers.gcs import GcsServer
from tests.hostile import echo
from tests.run.making import walk

CANARY = "CaNaRy"
"""Part of every credential here."""
OPTIONS: dict[str, Any] = {
    "secret": f"{CANARY}-secret/+=",
    "client_kwargs": {
        "aws_session_token": f"{CANARY}-token",
        "headers": [{"Authorization": f"Bearer {CANARY}-bearer"}],
    },
    "password": f"{CANARY}-password",
    "endpoint_url": f"https://me:{CANARY}-endpoint@host:9000/?X-Amz-Signature={CANARY}-signed",
}
URL = f"talking://KEY:{CANARY}%2Fuser@lab/runs?X-Amz-Credential={CANARY}-id&X-Amz-Signature={CANARY}-sig#{CANARY}-end"
ENVIRONMENT = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "GOOGLE_TOKEN", "HF_TOKEN")


class Talking(MemoryFileSystem):  # type: ignore[misc]
    """A file system of one process that, when it is told to fail, says all that it knows, and logs it as others do."""

    protocol = "talking"
    cachable = False
    objects: ClassVar[dict[str, Any]] = {}
    fails: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.known = f"{options} {URL}"
        self.store, self.pseudo_dirs = Talking.objects, [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol("/" + path.split("://")[-1].split("@")[-1].split("?")[0].strip("/")))

    def _may_fail(self, method: str) -> None:
        if method in Talking.fails.split():
            try:
                raise KeyError(self.known)
            except KeyError as cause:
                raise OSError(5, f"{method} failed with {self.known}") from cause

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("pipe_file")
        return super().pipe_file(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("cat_file")
        return super().cat_file(*arguments, **options)

    def cat_ranges(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("cat_ranges")
        return super().cat_ranges(*arguments, **options)

    def open(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("open")
        return super().open(*arguments, **options)

    def info(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("info")
        return super().info(*arguments, **options)

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("ls")
        return super().ls(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> Any:
        self._may_fail("rm_file")
        return super().rm_file(*arguments, **options)


class Ear(logging.Handler):
    """Hears every logger at every level, with the tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.setFormatter(logging.Formatter("%(name)s %(threadName)s %(message)s %(args)s %(pathname)s"))
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ear]:
    """The talking file system is there, credentials are in the environment, and all that is logged is heard."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setattr(Talking, "objects", {})
    fsspec.register_implementation("talking", Talking, clobber=True)
    listener, root = Ear(), logging.getLogger()
    level = root.level
    others = [logging.getLogger(name) for name in ("shardckpt", "fsspec", "fsspec.memory", "torch.distributed")]
    levels = [logger.level for logger in others]
    root.addHandler(listener)
    for logger in (root, *others):
        logger.setLevel(logging.DEBUG)
    yield listener
    root.removeHandler(listener)
    root.setLevel(level)
    for logger, before in zip(others, levels, strict=True):
        logger.setLevel(before)


def shown_by(error: BaseException) -> str:
    """All that anybody may see of an error: its text, its data, what it chains, the traceback."""
    seen, links = [], [error]
    while links:
        link = links.pop()
        seen += [str(link), repr(link), repr(link.args), repr(vars(link))]
        links += [other for other in (link.__cause__, link.__context__) if other is not None]
    return "\n".join([*seen, *traceback.format_exception(error)])


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(4, 4)}, "progress": {"n": 1}}


def life(root: str, options: dict[str, Any], trace: Path) -> Iterator[object]:
    """What a job does with a manager, with all that it may print of it."""
    manager = sc.CheckpointManager(root, keep=sc.KeepLast(2), storage_options=options, tolerate=9)
    with manager as checkpoints:
        yield checkpoints
        checkpoints.subscribe(sc.Trace(trace))
        checkpoints.save_model_metadata(family="f", config={"a": 1})
        for step in (1, 2, 3):
            pending = checkpoints.save(step, state(), metadata={"loss": 1.0})
            yield pending
            yield pending.result()
            yield pending.report
        checkpoints.save_score(0.5, step=3)
        yield checkpoints.resume(state())
        yield checkpoints.steps()


def test_nothing_shows_a_credential_when_all_goes_well(ear: Ear, tmp_path: Path) -> None:
    shown = [text for thing in life(URL, OPTIONS, tmp_path / "trace.json") for text in (repr(thing), str(thing))]
    assert not [text for text in shown if CANARY in text]
    assert not [text for text in ear.heard if CANARY in text]
    assert ear.heard, "the ear is deaf"
    files = {key: file.getvalue() for key, file in Talking.objects.items()}
    assert any(key.endswith("manifest.json") for key in files)
    files["trace"] = (tmp_path / "trace.json").read_bytes()
    assert not [key for key, content in files.items() if CANARY.encode() in content or CANARY in key]


@pytest.mark.parametrize(
    "fails", ["pipe_file open", "cat_file", "cat_ranges", "info", "ls", "rm_file", "cat_file info ls"]
)
def test_nothing_shows_a_credential_when_the_storage_talks(
    ear: Ear, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in life(URL, OPTIONS, tmp_path / "trace.json"):
        pass
    shown = fail_at_everything(fails, monkeypatch)
    assert shown
    assert not [text for text in shown if CANARY in text]
    assert not [text for text in ear.heard if CANARY in text]


def test_the_search_finds_what_leaks(ear: Ear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrecy.Redactor, "__call__", lambda self, text: text)
    for _ in life(URL, OPTIONS, tmp_path / "trace.json"):
        pass
    fail_at_everything("rm_file", monkeypatch)  # what cannot be pruned is logged
    shown = fail_at_everything("pipe_file open cat_file", monkeypatch)
    assert [text for text in shown if CANARY in text]
    assert [text for text in ear.heard if CANARY in text]


def fail_at_everything(fails: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the errors show of each thing that fails while the storage does."""
    reader = sc.DcpReader(f"{URL.partition('?')[0]}/step_3", storage_options=OPTIONS)
    with sc.CheckpointManager(URL, keep=sc.KeepLast(1), storage_options=OPTIONS, tolerate=9) as checkpoints:
        monkeypatch.setattr(Talking, "fails", fails)
        shown = errors_of_everything(checkpoints, reader)
        monkeypatch.setattr(Talking, "fails", "")
    return shown


def errors_of_everything(checkpoints: sc.CheckpointManager, reader: sc.DcpReader) -> list[str]:
    """What is shown by the errors of all that a program does with a manager and a reader, one for each that fails."""
    shown = []
    for call in (
        lambda: checkpoints.save(4, state()).result(),
        lambda: checkpoints.load(3, state()),
        lambda: checkpoints.resume(state()),
        lambda: checkpoints.steps(),
        lambda: checkpoints.save_score(1.0, step=3),
        lambda: checkpoints.save_model_metadata(family="g", config={}),
        lambda: checkpoints.delete_checkpoint(2),
        lambda: checkpoints.load_last_checkpoint(),
        lambda: dcp.load(state(), storage_reader=reader),
    ):
        try:
            call()
        except BaseException as error:  # DCP's own is no Exception
            shown.append(shown_by(error))
    return shown


@pytest.mark.usefixtures("ear")
def test_what_is_sent_to_other_processes_or_printed_of_dcps_storages() -> None:
    url = f"talking://KEY:{CANARY}@lab/runs/step_1"
    for made in (sc.DcpReader(url, storage_options=OPTIONS), sc.DcpWriter(url, storage_options=OPTIONS)):
        assert CANARY not in f"{made!r} {made} {made.checkpoint_id}"
    with pytest.raises(TypeError, match="credentials"):
        pickle.dumps(open_storage(url, storage_options=OPTIONS))


@pytest.mark.s3
def test_the_clients_of_s3_are_not_made_to_log_secrets(ear: Ear, free_port: int) -> None:
    """A server that is not there: s3fs and botocore log each try, at DEBUG, with whatever they were given."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    for name in ("s3fs", "botocore", "aiobotocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.INFO if name == "botocore" else logging.DEBUG)
    options = {
        "key": "AKIAPUBLIC",
        "secret": f"{CANARY}-secret",
        "token": f"{CANARY}-token",
        "endpoint_url": f"http://127.0.0.1:{free_port}",
        "config_kwargs": {"connect_timeout": 1, "read_timeout": 1},
    }
    storage = open_storage(f"s3://bucket/x?sig={CANARY}", storage_options=options)
    with pytest.raises(OSError, match="s3://bucket/x") as caught:
        storage.read("a")
    storage.close()
    assert CANARY not in shown_by(caught.value)
    assert not [text for text in ear.heard if CANARY in text and text.startswith("shardckpt")]
    assert os.environ["HF_TOKEN"].startswith(CANARY)


@pytest.fixture
def tokens_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else gcsfs sends each to Google, to be told when it expires."""
    monkeypatch.setenv("FETCH_RAW_TOKEN_EXPIRY", "false")


def check_that_a_life_shows_none_of(
    secrets: tuple[str, ...], root: str, options: dict[str, Any], ear: Ear, trace: Path
) -> None:
    """All goes well; neither what is printed, logged (by clients, too), stored nor traced has one of them."""
    shown = [text for thing in life(root, options, trace) for text in (repr(thing), str(thing))]
    storage = open_storage(root, storage_options=options)
    shown += [f"{key} {storage.read(key).decode('latin-1')}" for key in walk(storage)]
    assert any("manifest.json" in text for text in shown)
    storage.close()
    for text in (*shown, *ear.heard, trace.read_text()):
        assert not [secret for secret in secrets if secret in text]
    assert ear.heard, "the ear is deaf"


@pytest.mark.leaks(threads=("gcsfs-",), why="of gcsfs, which closes files that were dropped; one for all")
def test_nothing_shows_a_credential_of_googles(
    ear: Ear, tokens_as_they_are: None, gcs_server: GcsServer, tmp_path: Path
) -> None:
    root = f"gs://{gcs_server.bucket}/{uuid.uuid4().hex}"
    options = {**gcs_server.options, "token": f"{CANARY}-token"}
    check_that_a_life_shows_none_of((CANARY,), root, options, ear, tmp_path / "trace.json")


def test_nothing_shows_a_credential_of_microsofts(ear: Ear, azure_server: BlobServer, tmp_path: Path) -> None:
    storage = open_storage("az://canary", storage_options=azure_server.options)
    storage._client().mkdir("canary")  # type: ignore[attr-defined]
    storage.close()
    secrets = (azure_server.account_key, CANARY)
    root, options = f"az://canary/{uuid.uuid4().hex}", dict(azure_server.options)
    check_that_a_life_shows_none_of(secrets, root, options, ear, tmp_path / "trace.json")


def options_of(scheme: str, endpoint: str) -> dict[str, Any]:
    """With credentials that go to the server as they are."""
    if scheme == "gs":
        return {"endpoint_url": endpoint, "token": f"{CANARY}-token", "project": "test"}
    if scheme == "s3":
        return {"key": "AKIAPUBLIC", "secret": f"{CANARY}-secret", "token": f"{CANARY}-token", "endpoint_url": endpoint}
    signature = f"sv=2024-08-04&ss=b&srt=sco&sp=rwdl&se=2099-01-01T00%3A00%3A00Z&sig={CANARY}%2Bsigned%3D"
    return {"connection_string": f"BlobEndpoint={endpoint}/account;SharedAccessSignature={signature}"}


@pytest.mark.parametrize("scheme", ["gs", "az", "s3"])
def test_nothing_shows_a_credential_when_the_server_says_all_that_it_was_sent(
    ear: Ear, tokens_as_they_are: None, scheme: str, request: pytest.FixtureRequest
) -> None:
    if scheme == "gs":
        request.getfixturevalue("plain_gcsfs")
    else:
        pytest.importorskip({"az": "adlfs", "s3": "s3fs"}[scheme])
    with echo.answering(echo.in_json if scheme == "gs" else echo.in_xml) as (endpoint, said):
        root, options = f"{scheme}://bucket/run", options_of(scheme, endpoint)
        reader = sc.DcpReader(f"{root}/step_3", storage_options=options)
        with sc.CheckpointManager(root, storage_options=options, tolerate=9) as checkpoints:
            shown = errors_of_everything(checkpoints, reader)
    assert len(shown) == 9
    assert [text for text in said if CANARY in text], "it was sent nothing that is secret"
    assert not [text for text in shown if CANARY in text]
    assert not [text for text in ear.heard if CANARY in text and text.startswith("shardckpt")]
