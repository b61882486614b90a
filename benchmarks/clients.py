"""Bare clients of S3, each with several settings: what `benchmarks.objects` holds ours against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from shardckpt.storage import open_storage
from shardckpt.storage.objects.direct import Direct
from shardckpt.testing.servers.seaweed import ObjectServer

_MiB = 1 << 20
_PUTS = ((8, 4), (8, 8), (16, 4))
"""MiB of a part, and how many are under way."""
_GETS = ((8, 4), (8, 16), (32, 4))
"""The same of ranges."""


class Bare:
    """The clients themselves: one object of as many bytes as the state has."""

    def __init__(self, server: ObjectServer, nbytes: int) -> None:
        storage: Any = open_storage(server.url, storage_options={**server.options, "client": "direct"})
        self._direct = Direct()
        self._fs = storage._client()
        self._bucket = server.bucket
        self._obstore: Any = None
        with suppress(ImportError):  # where it is installed, it is measured as well
            self._obstore = importlib.import_module("obstore")
            self._store = importlib.import_module("obstore.store").S3Store(
                server.bucket,
                access_key_id=server.access_key,
                secret_access_key=server.secret_key,
                endpoint=server.endpoint,
                region="us-east-1",
                client_options={"allow_http": True, "allow_invalid_certificates": True},
            )
        noise = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        self._content = memoryview(noise.numpy().data).cast("B")

    def puts(self) -> dict[str, Callable[[str], object]]:
        own: dict[str, Callable[[str], object]] = {
            "put, s3fs as shipped": lambda key: self._fs.pipe_file(f"{self._bucket}/{key}", bytes(self._content))
        }
        for part, threads in _PUTS:
            own[f"put, s3fs, {part} MiB x {threads}"] = partial(self._put_s3fs, nbytes=part * _MiB, threads=threads)
            if self._obstore is not None:
                put = partial(self._put_obstore, nbytes=part * _MiB, threads=threads)
                own[f"put, obstore, {part} MiB x {threads}"] = put
        return own

    def gets(self) -> dict[str, Callable[[str], object]]:
        """Those that give objects of their own, and those that fill memory that is made for it each time."""
        own: dict[str, Callable[[str], object]] = {}
        for mib, threads in _GETS:
            size, nbytes = f"{mib} MiB x {threads}", mib * _MiB
            own[f"get, s3fs, {size}"] = partial(self._get_s3fs, nbytes=nbytes, threads=threads)
            own[f"get, direct, {size}"] = partial(self._get_direct, nbytes=nbytes, threads=threads)
            if self._obstore is not None:
                own[f"get, obstore, {size}"] = partial(self._get_obstore, nbytes=nbytes, threads=threads)
        if self._obstore is not None:
            own["get, obstore, 8 MiB, by itself"] = self._get_obstore_ranges
        return own

    def close(self) -> None:
        self._direct.close()

    def remove(self, key: str) -> None:
        self._fs.rm_file(f"{self._bucket}/{key}")

    def _put_obstore(self, key: str, *, nbytes: int, threads: int) -> None:
        where, what = (self._store, key), self._content
        self._obstore.put(*where, what, use_multipart=True, chunk_size=nbytes, max_concurrency=threads)

    def _put_s3fs(self, key: str, *, nbytes: int, threads: int) -> None:
        place = {"Bucket": self._bucket, "Key": key}
        upload = self._fs.call_s3("create_multipart_upload", **place)["UploadId"]
        cuts = range(0, len(self._content), nbytes)

        def put(number: int) -> str:
            body = bytes(self._content[cuts[number] : cuts[number] + nbytes])
            answer = self._fs.call_s3("upload_part", **place, UploadId=upload, PartNumber=number + 1, Body=body)
            return str(answer["ETag"])

        with ThreadPoolExecutor(threads) as pool:
            tags = list(pool.map(put, range(len(cuts))))
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        self._fs.call_s3("complete_multipart_upload", **place, UploadId=upload, MultipartUpload={"Parts": parts})

    def _ranges(self, nbytes: int) -> tuple[list[int], list[int]]:
        starts = list(range(0, len(self._content), nbytes))
        return starts, [min(start + nbytes, len(self._content)) for start in starts]

    def _get_s3fs(self, key: str, *, nbytes: int, threads: int) -> None:
        starts, ends = self._ranges(nbytes)
        paths = [f"{self._bucket}/{key}"] * len(starts)
        self._fs.cat_ranges(paths, starts, ends, batch_size=threads, on_error="raise")

    def _get_obstore(self, key: str, *, nbytes: int, threads: int) -> None:
        def get(start: int, end: int) -> object:
            return self._obstore.get_range(self._store, key, start=start, end=end)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(get, *self._ranges(nbytes)))

    def _get_obstore_ranges(self, key: str) -> None:
        """As many at once as it finds right."""
        starts, ends = self._ranges(8 * _MiB)
        self._obstore.get_ranges(self._store, key, starts=starts, ends=ends, coalesce=0)

    def _get_direct(self, key: str, *, nbytes: int, threads: int) -> None:
        into = torch.empty(len(self._content), dtype=torch.uint8).numpy().data.cast("B")

        def get(start: int, end: int) -> None:
            self._direct.get_range(self._fs, f"{self._bucket}/{key}", start, [into[start:end]])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(get, *self._ranges(nbytes)))
