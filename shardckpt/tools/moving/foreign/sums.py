"""CRCs of records that are read bit by bit: known as soon as one has been read from its first byte to its last."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass

from shardckpt.format.checksum import crc32


@dataclass(slots=True)
class _Run:
    position: int = 0
    crc: int = 0


class RunningSums:
    """Of the records of any number of files. Any thread may call; pieces that come in no order are not summed up."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, _Run] = {}
        self._lock = threading.Lock()

    def add(self, record: Hashable, at: int, content: memoryview, *, nbytes: int, crc: int) -> bool:
        """Some bytes of a record of so many bytes have been read; False if they were the last and this is not its CRC.

        A record is begun anew by its first byte.
        """
        with self._lock:
            run = self._runs.setdefault(record, _Run())
            if at == 0:
                run.position, run.crc = 0, 0
            if at != run.position:
                return True
            run.crc = crc32(content, run.crc)
            run.position += len(content)
            return run.position < nbytes or run.crc == crc
