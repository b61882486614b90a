"""The configuration of a run as plain data without credentials, and what differs between two. Pure."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from shardckpt.errors import InvalidStateError
from shardckpt.storage.objects.secrecy import HIDDEN, Redactor

_DEEPEST = 64
"""Lists and dicts within each other; what holds itself is deeper."""
_SECRET = re.compile(
    r"(.*[_.-])?(password|passwd|passphrase|secret|secret_?key|api_?key|access_?key(_id)?|private_?key|credentials?"
    r"|(auth|access|api|bearer|hf|session|refresh)_?token)|token",
    re.IGNORECASE,
)
"""Keys whose texts are not recorded. "token" by itself, but not eos_token or max_tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One entry of a configuration that is not what it was."""

    key: str
    """The keys from the top down, joined by dots; places in lists as numbers."""
    kind: Literal["changed", "added", "removed"]
    was: Any = None
    now: Any = None

    def __str__(self) -> str:
        if self.kind == "changed":
            return f"{self.key}: {self.was!r:.80} is now {self.now!r:.80}"
        return (
            f"{self.key}: {self.now!r:.80} is new" if self.kind == "added" else f"{self.key}: {self.was!r:.80} is gone"
        )


def plain_config(config: Any) -> dict[str, Any]:
    """A copy of a configuration as JSON has it, without credentials.

    Taken are mappings, dataclasses and objects with `__dict__` (`argparse.Namespace`) at the top; below, tuples and
    sets become lists, and what JSON cannot hold becomes its text (`torch.float32`, a path). Of URLs, user, password and
    query are left out; texts under keys that are called like secrets are hidden. `InvalidStateError` for anything else
    at the top, and for what holds itself.
    """
    if not isinstance(config, Mapping) and not _has_fields(config):
        config = getattr(config, "__dict__", None)
        if config is None:
            raise InvalidStateError("the config of a run is a dict, a dataclass or an argparse.Namespace")
    copied: dict[str, Any] = _plain(config, "", 0)
    return copied


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every entry that differs between two plain configurations, by key."""
    before, after = dict(_leaves(was, "")), dict(_leaves(now, ""))
    found = []
    for key in sorted({*before, *after}):
        if key not in after:
            found.append(Difference(key, "removed", was=before[key]))
        elif key not in before:
            found.append(Difference(key, "added", now=after[key]))
        elif (type(before[key]), before[key]) != (type(after[key]), after[key]):
            found.append(Difference(key, "changed", before[key], after[key]))
    return tuple(found)


def _plain(value: Any, key: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise InvalidStateError(f"the config of a run is nested too deeply, or holds itself, at {key[:80]!r}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if _has_fields(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item, str(name), depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, key, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, key, depth + 1) for item in value), key=repr)
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    return HIDDEN if _SECRET.fullmatch(key) and text else Redactor()(str(text))


def _has_fields(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of what is not nested further; an empty dict or list is such a value."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield key, value
        return
    for name, item in inner:
        yield from _leaves(item, f"{key}.{name}" if key else str(name))
