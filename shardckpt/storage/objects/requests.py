"""The single requests to S3, through s3fs: each is one try, and raises what s3fs raises.

Any thread may call. `path` is bucket and key, as s3fs writes them.

A status of 200 proves nothing: gateways and login pages answer it in the place of the server, and S3 itself with an
error inside. botocore finds the error, but takes any other page for an answer that says nothing: a put that was done,
a folder in which nothing is. So each answer must have what S3 always gives with it (`_answered`).
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isal import isal_zlib

from shardckpt.storage.objects.translate import number_of_code, service_codes

_STAMP = "shardckpt-put"
"""Name of the user metadata that tells one put from another."""
_CHUNK = 1 << 20
_PATIENCE_S = 60.0
"""What botocore waits for an answer, if it is not told otherwise."""
_SLOWEST = 32 << 10
"""Bytes per second, of one request among several: what is put more slowly is taken for what has stopped."""
_REFUSED = {"PreconditionFailed", "412"}
UNKNOWN_HEADER = frozenset({"NotImplemented", "501", "InvalidArgument"})
"""What servers answer to a condition that they do not know."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the server says of an object without giving it."""

    nbytes: int
    stamp: str | None
    """Of the put that made it, if that was one of ours."""


def new_stamp() -> str:
    """A put's own, kept through its repetitions: by it a put that is refused finds that it was refused by itself."""
    return secrets.token_hex(8)


def put_object(fs: Any, path: str, content: bytes, *, new: bool, stamp: str | None = None) -> None:
    """`new`: only if nothing is there (`If-None-Match: *`)."""
    _answered(_send(fs, "put_object", path, content, **_stamped(stamp), **_only_if(new)), "ETag")


def put_over(fs: Any, path: str, content: bytes, *, tag: str) -> None:
    """Only over what has this tag (`If-Match`); over anything where the server does not know that."""
    try:
        answer = _send(fs, "put_object", path, content, IfMatch=tag)
    except Exception as error:
        codes = set(service_codes(error))
        if codes & UNKNOWN_HEADER:
            answer = _send(fs, "put_object", path, content)
        elif (codes & _REFUSED or isinstance(error, FileExistsError)) and get_tagged(fs, path)[1] == tag:
            # Ceph 16 knows a tag only without the quotes in which it gives it, and refuses all others.
            answer = _send(fs, "put_object", path, content, IfMatch=tag.strip('"'))
        else:
            raise
    _answered(answer, "ETag")


def start_upload(fs: Any, path: str, *, stamp: str) -> str:
    """Begin a multipart upload; gives its id."""
    return str(_answered(fs.call_s3("create_multipart_upload", **_place(fs, path), **_stamped(stamp)), "UploadId"))


def put_part(fs: Any, path: str, upload: str, number: int, content: memoryview) -> str:
    """Gives the tag by which `finish_upload` knows the part. Holds one copy of it: s3fs takes no memoryview."""
    answer = _send(fs, "upload_part", path, bytes(content), UploadId=upload, PartNumber=number)
    return str(_answered(answer, "ETag"))


def finish_upload(fs: Any, path: str, upload: str, parts: Sequence[tuple[int, str]], *, new: bool) -> None:
    """Publish the parts, sorted by number, as the object."""
    listed = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(parts)]
    answer = fs.call_s3(
        "complete_multipart_upload",
        **_place(fs, path),
        UploadId=upload,
        MultipartUpload={"Parts": listed},
        **_only_if(new),
    )
    _answered(answer, "ETag")


def abort_upload(fs: Any, path: str, upload: str) -> None:
    """Drop an upload and the parts that it has."""
    fs.call_s3("abort_multipart_upload", **_place(fs, path), UploadId=upload)


def list_uploads(fs: Any, path: str) -> Iterator[tuple[str, str]]:
    """Path and id of every upload whose path begins with `path`."""
    bucket, prefix, _ = fs.split_path(path)
    page: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        truncated = _answered(answer, "IsTruncated")
        for upload in answer.get("Uploads", ()):
            yield f"{bucket}/{upload['Key']}", str(upload["UploadId"])
        if not truncated:
            return
        page = {"KeyMarker": _answered(answer, "NextKeyMarker"), "UploadIdMarker": answer.get("NextUploadIdMarker", "")}


def list_folder(fs: Any, path: str) -> Iterator[tuple[str, bool]]:
    """Names directly below the folder (or the bucket), and whether each is a folder; nothing if there is none."""
    bucket, folder, _ = fs.split_path(path)
    prefix = f"{folder}/" if folder else ""
    page: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **page)
        truncated = _answered(answer, "IsTruncated")
        for below in answer.get("CommonPrefixes", ()):
            yield str(below["Prefix"]).removeprefix(prefix)[:-1], True
        for found in answer.get("Contents", ()):
            name = str(found["Key"]).removeprefix(prefix)
            if name:  # else the marker of the folder itself
                yield name, False
        if not truncated:
            return
        page = {"ContinuationToken": _answered(answer, "NextContinuationToken")}


def look_at(fs: Any, path: str) -> Head:
    """`FileNotFoundError` if there is no such object."""
    answer = fs.call_s3("head_object", **_place(fs, path))
    _answered(answer, "ETag")
    return Head(int(answer["ContentLength"]), answer.get("Metadata", {}).get(_STAMP))


def get_object(fs: Any, path: str) -> bytes:
    """All of it, in one request."""
    return get_tagged(fs, path)[0]


def get_tagged(fs: Any, path: str) -> tuple[bytes, str]:
    """All of it, and the tag by which `put_over` knows it again."""
    from fsspec.asyn import sync

    content, tag = sync(fs.loop, _get, fs, path)
    return bytes(content), str(tag)


def get_range(fs: Any, path: str, offset: int, into: Sequence[memoryview], sums: list[int] | None = None) -> int:
    """Fill the buffers, one after the other, with the bytes from `offset` on, as they come; gives how many came, and in
    `sums` the CRC-32 of each buffer, if it is given."""
    from fsspec.asyn import sync

    have = int(sync(fs.loop, _get_range, fs, path, offset, into))
    if sums is not None:
        sums[:] = map(isal_zlib.crc32, into)  # in the caller's thread: the loop has the ranges of all others
    return have


def delete_objects(fs: Any, paths: Sequence[str]) -> None:
    """A thousand at most. Not by s3fs's bulk delete: it swallows errors."""
    bucket = fs.split_path(paths[0])[0]
    objects = [{"Key": fs.split_path(path)[1]} for path in paths]
    # Not quiet: what a server says that has deleted nothing is like what it then says of success.
    answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": False})
    for failed in answer.get("Errors", []):
        code = str(failed.get("Code"))
        raise OSError(number_of_code(code), f"{failed.get('Key')}: {code} {failed.get('Message')}")
    _answered(answer, "Deleted")


def delete_marker(fs: Any, path: str) -> None:
    """Delete what stands for a folder, if there is such a thing."""
    bucket, key, _ = fs.split_path(path)
    fs.call_s3("delete_object", Bucket=bucket, Key=f"{key}/")


def _send(fs: Any, method: str, path: str, content: bytes, **terms: Any) -> Any:
    """The answer to a request that puts something.

    It has a limit of its own: the client's timeout (`read_timeout`) begins when all is sent, and a server that takes
    the connection and then nothing more would be waited for without end, be it for its "100 Continue".
    """
    from fsspec.asyn import sync

    patience_s = float((fs.config_kwargs or {}).get("read_timeout", _PATIENCE_S))
    limit_s = patience_s + len(content) / _SLOWEST
    return sync(fs.loop, _in_time, fs, method, limit_s, **_place(fs, path), Body=content, **terms)


async def _in_time(fs: Any, method: str, limit_s: float, /, **terms: Any) -> Any:
    return await asyncio.wait_for(fs._call_s3(method, **terms), limit_s)


async def _get(fs: Any, path: str) -> tuple[bytes, str]:
    answer = await fs._call_s3("get_object", **_place(fs, path))
    try:
        return await answer["Body"].read(), _answered(answer, "ETag")
    finally:
        answer["Body"].close()


async def _get_range(fs: Any, path: str, offset: int, into: Sequence[memoryview]) -> int:
    nbytes = sum(map(len, into))
    answer = await fs._call_s3("get_object", **_place(fs, path), Range=f"bytes={offset}-{offset + nbytes - 1}")
    body, have = answer["Body"], 0
    try:
        _answered(answer, "ETag")
        if offset and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise NotImplementedError("the server gives whole objects where a range is asked for")
        for buffer in into:
            view = buffer
            while len(view):
                chunk = await body.read(min(len(view), _CHUNK))
                if not chunk:
                    return have
                view[: len(chunk)] = chunk
                view, have = view[len(chunk) :], have + len(chunk)
        return have
    finally:
        body.close()


def _answered(answer: Mapping[str, Any], name: str) -> Any:
    """What S3 always gives under this name. `OSError` with `EPROTO` if it is not there: the answer is none of S3's."""
    if name not in answer:
        raise OSError(errno.EPROTO, f"the answer has no {name}")
    return answer[name]


def _place(fs: Any, path: str) -> dict[str, str]:
    bucket, key, _ = fs.split_path(path)
    return {"Bucket": bucket, "Key": key}


def _stamped(stamp: str | None) -> dict[str, Any]:
    return {"Metadata": {_STAMP: stamp}} if stamp else {}


def _only_if(new: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if new else {}
