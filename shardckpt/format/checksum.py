"""CRC-32 as in ZIP and zlib (ISO-HDLC, polynomial 0x04C11DB7), and its algebra.

One checksum serves the zip headers, the indexes and the digest of a whole file: because the CRC of a
concatenation follows from the CRCs of its pieces, every byte of a tensor is summed exactly once.

2026-11: of zlib (2.3 GB/s), google-crc32c (another polynomial, of no use in a zip) and isal (16 GB/s, one
thread, 256 MiB, same machine), isal is the one that does not show beside a memory copy; it releases the GIL.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from typing import Any

from isal.isal_zlib import crc32, crc32_combine

__all__ = ["all_from_hex", "combine", "crc32", "crc32_combine", "from_hex", "to_hex", "value_digest"]

_HEX = re.compile(r"[0-9a-f]{8}")
_MANY_HEX = re.compile(r"[0-9a-f]*")


def combine(pieces: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(crc, nbytes) of the concatenation of pieces, each given as (crc, nbytes)."""
    total_crc, total_nbytes = 0, 0
    for crc, nbytes in pieces:
        total_crc = crc32_combine(total_crc, crc, nbytes) if nbytes else total_crc
        total_nbytes += nbytes
    return total_crc, total_nbytes


def to_hex(crc: int) -> str:
    """Eight hexadecimal digits: of fixed width, so that a text that holds it keeps its length."""
    return f"{crc:08x}"


def from_hex(text: str) -> int:
    """The inverse of `to_hex`; `ValueError` for anything else."""
    if not isinstance(text, str) or _HEX.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a CRC-32 of eight hexadecimal digits")
    return int(text, 16)


def all_from_hex(text: str, count: int) -> tuple[int, ...]:
    """The CRCs of a text of `count` times eight digits, as an index holds them; `ValueError` for anything else."""
    if not isinstance(text, str) or len(text) != 8 * count or _MANY_HEX.fullmatch(text) is None:
        raise ValueError(f"not {count} CRC-32 of eight hexadecimal digits each")
    return struct.unpack(f">{count}I", bytes.fromhex(text))


def value_digest(value: Any) -> str:
    """A CRC-32 over the text of a Python value: equal values have equal texts, whatever objects they share."""
    return to_hex(crc32(_stable_text(value).encode("utf-8", "surrogatepass")))


def _stable_text(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return "set" + repr(sorted(map(_stable_text, value)))
    return repr(value)
