"""A record with one flipped bit, or a damaged end, mended: its SHA-256 proves that the result is what was written."""

from __future__ import annotations

import hashlib

from shardckpt.format.manifest import decode_manifest

_MARK, _END = b'"sha256": "', b'"\n}\n'
_TRAILER = len(_MARK) + 64 + len(_END)
_LONGEST = 32 << 10
"""Bytes of a record in which a flipped bit is searched for: every bit of it is tried, which takes seconds here."""
_FEW = 8
"""Digits of a digest that may be wrong and the digest still be known: 56 others agree by chance never."""


def mend_record(data: bytes) -> bytes | None:
    """The record as it was written, or None if this kind of damage is not what it has. Pure."""
    body, trailer = data[:-_TRAILER], data[-_TRAILER:]
    digest = hashlib.sha256(body).hexdigest().encode()
    said = trailer[len(_MARK) : len(_MARK) + 64]
    if sum(a != b for a, b in zip(digest, said, strict=False)) <= _FEW and len(said) == 64:
        return _sound(body + _MARK + digest + _END)
    if len(data) > _LONGEST:
        return None
    mended = _with_one_bit_turned(body, said)
    return _sound(mended + _MARK + said + _END) if mended is not None else None


def _with_one_bit_turned(body: bytes, digest: bytes) -> bytes | None:
    """The body that has this digest (in hexadecimal) and differs in one bit."""
    try:
        wanted = bytes.fromhex(digest.decode("ascii"))
    except ValueError:
        return None
    before = hashlib.sha256()
    for at, byte in enumerate(body):
        rest = body[at + 1 :]
        for bit in range(8):
            turned = before.copy()
            turned.update(bytes([byte ^ 1 << bit]) + rest)
            if turned.digest() == wanted:
                return body[:at] + bytes([byte ^ 1 << bit]) + rest
        before.update(body[at : at + 1])
    return None


def _sound(data: bytes) -> bytes | None:
    try:
        decode_manifest(data)
    except ValueError:
        return None
    return data
