"""Put one object over another that is known, and over nothing else: a record must not take the place of a later one."""

from __future__ import annotations

import errno

from shardckpt.storage.base import SharedPuts, Storage


def exchange(storage: Storage, key: str, known: bytes, content: bytes) -> None:
    """`replace`, but only what still is `known`: `FileExistsError` if it is another, `FileNotFoundError` if it is gone.

    On an object store that knows such a condition the server itself holds to it, also when the request comes late,
    after the job that has sent it died; elsewhere it is looked at just before.
    """
    if isinstance(storage, SharedPuts):
        storage.swap(key, known, content)
    elif storage.read(key) == known:
        storage.replace(key, content)
    else:
        raise saved_meanwhile(storage, key)


def saved_meanwhile(storage: Storage, what: str) -> OSError:
    return OSError(errno.EEXIST, f"{what} in {storage.url}: the step was saved by somebody else in the meantime")
