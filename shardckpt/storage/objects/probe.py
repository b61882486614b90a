"""Small objects by which a storage asks its server something. Whoever makes one removes it, unless that dies."""

from __future__ import annotations

import re
import secrets

_NAME = re.compile(r"\.probe-[0-9a-f]{16}")


def new_probe() -> str:
    """A name that no other one has, for an object right below the root."""
    return f".probe-{secrets.token_hex(8)}"


def is_probe(name: str) -> bool:
    """Whether an entry of the root is one, as `new_probe` names them."""
    return _NAME.fullmatch(name) is not None
