"""Values of arguments and options, converted without pydantic: typer (0.29) imports it for that, which takes 90 ms.

What is not just so, whatever is wrong with it, goes the way that typer has for it, and gets its message from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand, TyperGroup

_READ: dict[Any, Callable[[str], Any]] = {str: str, list[str]: str, int: int, float: float}
_PLAIN = {int: re.compile(r"-?[0-9]{1,15}"), float: re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")}


class QuickCommand(TyperCommand):
    """A command that begins at once."""

    def get_params(self, ctx: Any) -> Any:
        return _quickened(super().get_params(ctx))


class QuickGroup(TyperGroup):
    """The same, of what comes before a command."""

    def get_params(self, ctx: Any) -> Any:
        return _quickened(super().get_params(ctx))


def _quickened(params: list[Any]) -> list[Any]:
    """All of them, also those that typer adds, such as --help."""
    for param in params:
        if getattr(param, "_runtime_param", param) is None:
            param._runtime_param = _Quick(param.type_descriptor.annotation)
    return params


class _Quick:
    """In the place of what typer makes when a value is first converted."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        values = value if several and isinstance(value, (list, tuple)) else [value]
        if not all(self._is_plain(each, param) for each in values):
            param._runtime_param = None  # so that typer makes its own
            return param.get_runtime_param().coerce(value, param=param, ctx=ctx)
        read = [_READ[self._annotation](each) for each in values]
        return read if values is value else read[0]

    def _is_plain(self, value: Any, param: Any) -> bool:
        form = _PLAIN.get(self._annotation)
        if self._annotation not in _READ:
            return False
        if form is None or not isinstance(value, str):
            return isinstance(value, str if form is None else self._annotation)
        if form.fullmatch(value) is None:
            return False
        info = param.type_descriptor.parameter_info
        number = _READ[self._annotation](value)
        return bool((info.min is None or number >= info.min) and (info.max is None or number <= info.max))
