"""No credential is shown: not in a URL, a repr, an error, a traceback."""

from __future__ import annotations

import traceback

import pytest

from shardckpt.storage import FsspecStorage, RetryingStorage, open_storage, redact
from shardckpt.storage.objects.secrecy import Redactor

CANARY = "CaNaRy-5ecret"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/runs/a", "s3://bucket/runs/a"),
        ("s3://KEY:CaNaRy@bucket/runs/a", "s3://bucket/runs/a"),
        ("https://CaNaRy@host/x", "https://host/x"),
        ("https://user:CaNaRy@host:8080/x?a=1", "https://host:8080/x"),
        ("s3://bucket/x?token=CaNaRy", "s3://bucket/x"),
        ("s3://bucket/x#CaNaRy", "s3://bucket/x"),
        ("s3://bucket?versionId=CaNaRy", "s3://bucket"),
        ("s3://KEY:CaNa/Ry@bucket/x", "s3://bucket/x"),
        ("s3://KEY:Ca?Na#Ry@bucket/x", "s3://bucket/x"),
        ("s3://KEY:Ca@Na@Ry@bucket/x", "s3://bucket/x"),
        ("s3://bucket/user@host/x", "s3://bucket/user@host/x"),
        ("http://host:9000/a@b", "http://host:9000/a@b"),
        ("simplecache::s3://KEY:CaNaRy@bucket/x", "simplecache::s3://bucket/x"),
        ("zip://a?CaNaRy::https://user:CaNaRy@host/b", "zip://a::https://host/b"),
        ("/a/path@with#odd?names", "/a/path@with#odd?names"),
        ("", ""),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown
    assert redact(shown) == shown


def test_a_redactor_takes_out_what_it_knows_and_what_urls_hide() -> None:
    options = {
        "secret": "s3cret-a",
        "client_kwargs": {"aws_session_token": "s3cret-b", "nested": [{"x": "s3cret-c"}]},
        "token": b"s3cret-d",
        "endpoint_url": "http://user:s3cret-e@host/",
        "region_name": "eu-west-1",
        "anon": False,
        "short": "abc",
        "connection_string": "DefaultEndpointsProtocol=http;AccountName=account;AccountKey=s3cret+h/=;BlobEndpoint="
        "http://host/account?sv=2024-08-04&sig=s3cret%2Bi",
    }
    hide = Redactor(url="s3://me:s3cret%20f@bucket/x?sig=s3cret-g", options=options)
    secrets = ["s3cret-a", "s3cret-b", "s3cret-c", "s3cret-d", "s3cret-e", "s3cret%20f", "s3cret f", "s3cret-g"]
    for secret in [*secrets, "s3cret+h/=", "s3cret%2Bi", "s3cret+i"]:
        assert hide(f"before {secret} after") == "before *** after"
    for plain in ("abc in eu-west-1 of bucket", "http://host/account of account"):
        assert hide(plain) == plain
    assert hide("GET https://x:y@h/p?sig=unknown failed") == "GET https://h/p failed"
    assert "s3cret" not in repr(hide)


def shown_by(error: BaseException) -> str:
    """All that a person or a log may see of an error."""
    return "".join(traceback.format_exception(error)) + str(error) + repr(error) + repr(error.args)


def leaking_file_system():
    """A back end that says everything it knows whenever it fails."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Leaking(MemoryFileSystem):  # type: ignore[misc]
        protocol = "leaking"

        def __init__(self, **options) -> None:
            super().__init__(global_store=False)
            self.said = f"failed with {options} at https://user:{CANARY}-in-url@host/?sig={CANARY}-in-query"

        def _fail(self, *arguments, **options):
            try:
                raise KeyError(self.said)
            except KeyError as cause:
                raise OSError(5, self.said) from cause

        info = pipe_file = cat_file = ls = cat_ranges = rm_file = _fail

    return Leaking(password=CANARY, nested={"token": CANARY + "-nested"}, skip_instance_cache=True)


def test_errors_of_a_talkative_back_end() -> None:
    url = f"leaking://user:{CANARY}-user@place/x?key={CANARY}-query"
    storage = FsspecStorage(leaking_file_system(), "/place/x", url=url)
    assert storage.url == "leaking://place/x"
    assert CANARY not in repr(storage) + str(storage) + repr(RetryingStorage(storage))
    for call in (
        lambda: storage.put("a", [b"1"]),
        lambda: storage.replace("a", b"1"),
        lambda: storage.read("a"),
        lambda: storage.size("a"),
        lambda: storage.list(),
        lambda: storage.delete(["a"]),
        lambda: storage.delete_tree("a"),
    ):
        with pytest.raises(OSError, match="leaking://place/x") as caught:
            call()
        assert CANARY not in shown_by(caught.value)
        assert caught.value.__context__ is None


OPTIONS = {"secret": CANARY, "client_kwargs": {"aws_session_token": CANARY}}


@pytest.mark.parametrize(
    "url",
    [
        f"nosuchprotocol://user:{CANARY}@host/x?sig={CANARY}",
        f"simplecache::s3://user:{CANARY}@host/x",
        "/a/local/path",
    ],
)
def test_errors_of_opening(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        open_storage(url, storage_options=OPTIONS)
    assert CANARY not in shown_by(caught.value)


@pytest.mark.s3
def test_a_url_that_is_no_good_for_s3() -> None:
    """s3fs takes all before the first "/" for the bucket, and botocore says so at length."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    storage = open_storage(f"s3://user:{CANARY}@bucket/x?sig={CANARY}#{CANARY}", storage_options=OPTIONS)
    assert storage.url == "s3://bucket/x"
    for call in (storage.size, storage.read, lambda key: storage.put(key, [b"1"])):
        with pytest.raises(OSError, match="s3://bucket/x") as caught:
            call("a")
        assert CANARY not in shown_by(caught.value)
    assert CANARY not in repr(storage)
    storage.close()
