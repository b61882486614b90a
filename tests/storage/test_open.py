"""Which storage serves a URL or a path, and what opening one costs."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

import shardckpt.storage
from shardckpt.storage import FsspecStorage, LocalStorage, RenamingStorage, open_storage
from shardckpt.storage.base import SharedPuts
from tests.storage.s3server import S3Server


def test_paths_and_file_urls_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = str(tmp_path)
    wanted: dict[str | Path, str] = {
        here + "/a": here + "/a",
        tmp_path / "a": here + "/a",
        "a/../b": here + "/b",
        ".": here,
        "~/runs": here + "/home/runs",
        f"file://{here}/a": here + "/a",
        f"file://localhost{here}/a": here + "/a",
        f"local://{here}/a/": here + "/a",
        "file://a": here + "/a",
        "odd?name#1": here + "/odd?name#1",
        "c::d": here + "/c::d",
    }
    for given, path in wanted.items():
        storage = open_storage(given)
        assert isinstance(storage, LocalStorage)
        assert isinstance(storage, RenamingStorage)
        assert storage.url == path
    assert list(tmp_path.iterdir()) == []


def test_other_urls_go_through_fsspec() -> None:
    name = uuid.uuid4().hex
    storage = open_storage(f"memory://{name}/x/")
    assert isinstance(storage, FsspecStorage)
    assert not isinstance(storage, RenamingStorage)
    storage.put("a/b", [b"1"])
    assert fsspec.filesystem("memory").cat_file(f"/{name}/x/a/b") == b"1"
    assert open_storage(f"memory://{name}").list("x") == ["a/"]


def test_its_file_system_is_its_own_and_keeps_no_listings(tmp_path: Path) -> None:
    one, other = open_storage("memory://x"), open_storage("memory://x")
    assert isinstance(one, FsspecStorage)
    assert isinstance(other, FsspecStorage)
    assert one._client() is not other._client()
    assert not one._client().dircache.use_listings_cache


@pytest.mark.parametrize(
    ("protocol", "package"),
    [("s3", r"shardckpt\[s3\]"), ("gs", r"shardckpt\[gcs\]"), ("abfs", r"shardckpt\[azure\]"), ("sftp", "paramiko")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, protocol: str, package: str) -> None:
    def url_to_fs(url: str, **options):
        raise ImportError("Install something")

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with pytest.raises(ImportError, match=rf"{protocol}://bucket/x needs .* `pip install '{package}'`"):
        open_storage(f"{protocol}://user:password@bucket/x")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuchthing://x", "cannot open nosuchthing://x"),
        ("simplecache::s3://bucket/x", "chains file systems"),
        ("", "empty path"),
        ("file://", "empty path"),
    ],
)
def test_what_cannot_be_served(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_storage(url)


def test_a_local_path_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"given: key, secret"):
        open_storage(tmp_path, storage_options={"secret": "x", "key": "y"})


def test_a_local_run_imports_none_of_the_heavy_ones(tmp_path: Path) -> None:
    program = f"""
import sys
from shardckpt.storage import open_storage, LocalStorage, MemoryStorage, redact
open_storage({str(tmp_path)!r}).put("a/b", [b"1"])
print([name for name in ("torch", "fsspec", "s3fs", "botocore", "aiohttp", "tenacity", "numpy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in shardckpt.storage.__all__:
        assert getattr(shardckpt.storage, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shardckpt.storage.no_such_name


@pytest.mark.parametrize("nbytes", [1 << 20, 2 << 30, "8MiB", 0.5])
def test_a_size_that_s3_knows_no_parts_of_is_refused(nbytes: object) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    with pytest.raises(ValueError, match="part_nbytes is a number of bytes"):
        open_storage("s3://bucket/a", storage_options={"part_nbytes": nbytes})


def test_what_is_put_into_s3_goes_out_in_parts_of_the_size_that_was_asked_for(s3: S3Server, s3_url: str) -> None:
    content = bytes(48 << 20)
    for options, expected in (({}, 6), ({"part_nbytes": 24 << 20}, 2)):
        storage = open_storage(s3_url, storage_options={**s3.options, **options})
        assert isinstance(storage, SharedPuts)
        upload = storage.begin_upload("large")
        parts = storage.put_parts("large", upload, [content], numbers=range(1, 100))
        assert len(parts) == expected
        storage.abort_upload("large", upload)
        storage.close()
