"""Parts and ranges to and from S3 on the calling threads' own connections; s3fs signs for them, and does all the rest.

What s3fs sends it copies three times and sums twice, on the one thread of its event loop. Here a part goes out of the
caller's memory as it lies there, a range comes into it, and other threads run meanwhile. What a user has set for s3fs
holds: endpoint, credentials, proxy, certificates, time limits. Only what must be said in further headers cannot be.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

from isal import isal_zlib

_CHUNK = 1 << 20
_VALID_S = 900
"""From signing on; as much as clocks may differ, which servers allow for."""
_FRESH_S = 60.0
"""So long the signature for an object's ranges is used again: temporary credentials are renewed minutes in advance."""
_MOST_KEPT = 1000
_CRC32 = "x-amz-checksum-crc32"
_UNSAID = re.compile(r"\?[^\s'\"<>]*")
"""The query of a signed URL, wherever an error shows it."""


class Direct:
    """Does as `requests.put_part` and `requests.get_range` do. Any thread may call; each process connects anew."""

    def __init__(self) -> None:
        self._live: tuple[int, Any] | None = None
        self._signed: dict[str, tuple[float, str]] = {}

    def put_part(self, fs: Any, path: str, upload: str, number: int, content: memoryview) -> str:
        params, headers = {"UploadId": upload, "PartNumber": number}, dict[str, str]()
        if _client(fs, path).meta.config.request_checksum_calculation != "when_required":
            headers[_CRC32] = base64.b64encode(isal_zlib.crc32(content).to_bytes(4, "big")).decode()
            params["ChecksumCRC32"] = headers[_CRC32]
        answer = self._send(fs, path, "PUT", _sign(fs, path, "upload_part", params), headers, content)
        try:
            if answer.status_code != 200 or not answer.headers.get("ETag"):
                _raise_for(answer, "UploadPart")
            answer.content  # noqa: B018  (read to its end, the connection is free for the next request)
        finally:
            answer.raw.close()
        return str(answer.headers["ETag"])

    def get_range(
        self, fs: Any, path: str, offset: int, into: Sequence[memoryview], sums: list[int] | None = None
    ) -> int:
        end = offset + sum(map(len, into))
        url, headers = self._readable(fs, path), {"Range": f"bytes={offset}-{end - 1}"}
        answer = self._send(fs, path, "GET", url, headers, None)
        try:
            if answer.status_code not in (200, 206) or not answer.headers.get("ETag"):
                _raise_for(answer, "GetObject")
            if offset and not answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                raise NotImplementedError("the server gives whole objects where a range is asked for")
            have = _fill(answer.raw, into, sums)
        finally:
            answer.raw.close()
        if have < min(int(answer.headers.get("Content-Length", 0)), end - offset):
            raise ConnectionResetError(f"the answer ended after {have} bytes")
        return have

    def close(self) -> None:
        """Gives back the connections. A later call connects anew."""
        live, self._live = self._live, None
        self._signed.clear()
        if live is not None and live[0] == os.getpid():
            live[1].close()

    def _readable(self, fs: Any, path: str) -> str:
        signed, now = self._signed.get(path), time.monotonic()
        if signed is None or now - signed[0] > _FRESH_S:
            if len(self._signed) >= _MOST_KEPT:
                self._signed.clear()
            signed = self._signed[path] = (now, _sign(fs, path, "get_object", {}))
        return signed[1]

    def _send(
        self, fs: Any, path: str, method: str, url: str, headers: Mapping[str, str], body: memoryview | None
    ) -> Any:
        """One try; its answer, of which nothing is read yet."""
        from botocore.awsrequest import AWSPreparedRequest, HeadersDict

        live = self._live
        if live is None or live[0] != os.getpid():  # a connection that came through a fork is the parent's
            live = self._live = (os.getpid(), _new_session(fs, path, url))
        try:
            return live[1].send(AWSPreparedRequest(method, url, HeadersDict(headers), body, True))
        except Exception as error:
            lost = _lost(error)
        raise lost


def _fill(raw: Any, into: Sequence[memoryview], sums: list[int] | None) -> int:
    """The bytes as they come, into one buffer after the other; gives how many came, and what each buffer sums up to."""
    # What urllib3 itself reads it copies once more. It is left out where there is such a thing behind it.
    source = getattr(raw, "_original_response", None)
    have, found = 0, list[int]()
    for buffer in into:
        view, crc = buffer, 0
        while len(view):
            try:
                came = (raw if source is None else source).readinto(view[:_CHUNK])
            except Exception as error:
                lost = _lost(error)
            else:
                if not came:
                    return have
                if sums is not None:
                    crc = isal_zlib.crc32(view[:came], crc)
                view, have = view[came:], have + came
                continue
            raise lost
        found.append(crc)
    if source is not None and source.isclosed():  # read to its end: the connection is free for the next request
        raw.release_conn()
    if sums is not None:
        sums[:] = found
    return have


def _lost(error: Exception) -> Exception:
    """What to raise outside of the `except` block: of these errors some show the URL, signature and all."""
    said = f"{type(error).__name__}: {_UNSAID.sub('', str(error))}"
    return TimeoutError(said) if "Timeout" in type(error).__name__ else ConnectionError(said)


def _raise_for(answer: Any, operation: str) -> NoReturn:
    from botocore.exceptions import ClientError

    said, status = answer.content.decode("utf-8", "replace"), answer.status_code
    code, message = (re.search(f"<{name}>([^<]*)</{name}>", said) for name in ("Code", "Message"))
    if status in (200, 206) and not code:
        raise OSError(errno.EPROTO, f"the answer to {operation} has no ETag")
    what = {"Code": code[1] if code else str(status), "Message": message[1] if message else "not what S3 answers"}
    raise ClientError({"Error": what, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)


def _client(fs: Any, path: str) -> Any:
    """The aiobotocore client for this bucket, which s3fs keeps."""
    from fsspec.asyn import sync

    return sync(fs.loop, _connected, fs, path)


async def _connected(fs: Any, path: str) -> Any:
    await fs.set_session()
    return await fs.get_s3(fs.split_path(path)[0])


def _sign(fs: Any, path: str, operation: str, params: Mapping[str, Any]) -> str:
    """A URL by which this one request may be made. `NotImplementedError` if it takes headers that are not sent here."""
    from fsspec.asyn import sync

    url = str(sync(fs.loop, _presigned, fs, path, operation, params))
    named = parse_qs(urlsplit(url).query).get("X-Amz-SignedHeaders", ["host"])[0].split(";")
    if further := set(named) - {"host", _CRC32}:
        raise NotImplementedError(f"the direct client sends no {', '.join(sorted(further))}: leave client='direct' out")
    return url


async def _presigned(fs: Any, path: str, operation: str, params: Mapping[str, Any]) -> str:
    bucket, key, _ = fs.split_path(path)
    s3 = await _connected(fs, path)
    every = fs._get_s3_method_kwargs(getattr(s3, operation), Bucket=bucket, Key=key, **params)
    return str(await s3.generate_presigned_url(operation, Params=every, ExpiresIn=_VALID_S))


def _new_session(fs: Any, path: str, url: str) -> Any:
    """Connections with the settings that botocore would make for this client."""
    from botocore.endpoint import EndpointCreator
    from botocore.httpsession import URLLib3Session
    from botocore.utils import get_environ_proxies

    config = _client(fs, path).meta.config
    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle")
    return URLLib3Session(
        verify=EndpointCreator(None)._get_verify_value(verify),  # looks into the environment for what else there is
        proxies=config.proxies if config.proxies is not None else get_environ_proxies(url),
        timeout=(config.connect_timeout, config.read_timeout),
        max_pool_connections=config.max_pool_connections,
        client_cert=config.client_cert,
        proxies_config=config.proxies_config,
    )
