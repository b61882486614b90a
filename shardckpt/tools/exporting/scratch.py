"""The temporary folder in which files are written before they get their name, and those of who was killed meanwhile.

Its name says for what it is and on which machine it was made, `NAME.<machine><random>.tmp`, and who writes in it holds
a lock on it (`flock`), which the kernel takes back when the process ends, however it ends. So whoever next writes under
that NAME, on that machine, can tell what is left over from what is alive: what it can lock is nobody's. Where a file
system knows no such locks (NFS for folders), or another machine has made it, nothing is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
from contextlib import suppress

from shardckpt.storage.local import LocalStorage

_TRIES = 10


class Scratch:
    """A folder of this process's own, in a storage, until `let_go`."""

    def __init__(self, storage: LocalStorage, name: str) -> None:
        """Made for what will be called `name`. `OSError` as of `make_folder`."""
        for _ in range(_TRIES):
            self.folder = f"{name}.{_machine()}{secrets.token_hex(4)}.tmp"
            storage.make_folder(self.folder)
            self._file = os.open(storage.path_of(self.folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not _is_anothers(self._file) and _is_there(storage, self.folder, self._file):
                return
            self.let_go()  # swept before it was locked
        raise OSError(f"a temporary folder for {name!r} in {storage.url} is removed as soon as it is made")

    def let_go(self) -> None:
        os.close(self._file)


def sweep(storage: LocalStorage, name: str) -> list[str]:
    """Remove what was left over of `name`; gives the folders that are gone. `OSError` if that cannot be done."""
    pattern = re.compile(re.escape(f"{name}.{_machine()}") + r"[0-9a-f]{8}\.tmp/")
    gone = []
    for folder in filter(pattern.fullmatch, storage.list()):
        with suppress(FileNotFoundError, NotADirectoryError):
            path = storage.path_of(folder.rstrip("/"))
            file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                storage.delete_tree(folder)
                gone.append(folder.rstrip("/"))
            except OSError:
                continue  # of somebody who is alive, or nobody can tell
            finally:
                os.close(file)
    return gone


def _is_anothers(file: int) -> bool:
    """Lock a folder; whether somebody else has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there are no locks here, so that nobody will take it for left over
    return False


def _is_there(storage: LocalStorage, folder: str, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(storage.path_of(folder)), os.fstat(file))
    except FileNotFoundError:
        return False


def _machine() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
