"""Does this server refuse to create what is there already? Asked once per storage, with an object of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from shardckpt.storage.objects.probe import new_probe
from shardckpt.storage.objects.requests import (
    UNKNOWN_HEADER,
    delete_objects,
    finish_upload,
    new_stamp,
    put_object,
    put_part,
)
from shardckpt.storage.objects.requests import start_upload as start
from shardckpt.storage.objects.translate import service_codes

T = TypeVar("T")
Call: TypeAlias = Callable[[Callable[[Any], object]], object]
"""Does a request with retries, and raises the errors of the seam."""


class WriteOnce:
    """What a server answers to `If-None-Match: *`: it refuses (True), or it overwrites or does not know it (False).

    Any thread may ask; two that are the first at the same time both find out.
    """

    def __init__(self, folder: str) -> None:
        """`folder`: the path below which the probe's object is made, and removed again."""
        self._folder = folder
        self._of_puts: bool | None = None
        self._of_uploads: bool | None = None

    def of_puts(self, call: Call) -> bool:
        """Of an object that is put in one request."""
        if self._of_puts is None:
            self._of_puts = self._try(call, _put)
        return self._of_puts

    def of_uploads(self, call: Call) -> bool:
        """Of an upload in parts, when it is finished: Ceph 16 overwrites there what it would not overwrite by a put."""
        if self._of_uploads is None:
            self._of_uploads = self._try(call, _upload)
        return self._of_uploads

    def _try(self, call: Call, create: Callable[[Any, str], None]) -> bool:
        path = f"{self._folder}/{new_probe()}"
        try:
            call(lambda fs: put_object(fs, path, b"1", new=False))
            return bool(call(lambda fs: _is_refused(lambda: create(fs, path))))
        finally:
            with suppress(OSError):
                call(lambda fs: delete_objects(fs, [path]))


def _is_refused(create: Callable[[], None]) -> bool:
    """Whether this says that the object is there. Other errors go on, as those of any request."""
    try:
        create()
    except FileExistsError:
        return True
    except Exception as error:
        codes = set(service_codes(error))
        if codes & {"PreconditionFailed", "412"}:
            return True
        if codes & UNKNOWN_HEADER:
            return False
        raise
    return False


def _put(fs: Any, path: str) -> None:
    put_object(fs, path, b"2", new=True)


def _upload(fs: Any, path: str) -> None:
    upload = start(fs, path, stamp=new_stamp())
    try:
        tag = put_part(fs, path, upload, 1, memoryview(b"2"))
        finish_upload(fs, path, upload, [(1, tag)], new=True)
    except BaseException:
        from shardckpt.storage.objects.requests import abort_upload

        with suppress(Exception):
            abort_upload(fs, path, upload)
        raise
