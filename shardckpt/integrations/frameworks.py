"""How a framework is imported: when it is used, and with one clear message if it is not there."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class FrameworkMissingError(ImportError):
    """A package that an extra installs is not there. `name` is the package, `extra` what to install."""

    def __init__(self, package: str, extra: str, *, why: BaseException | None = None) -> None:
        broken = "" if why is None else f" (it is there, but does not import: {why})"
        super().__init__(f"this needs {package}{broken}: pip install 'shardckpt[{extra}]'", name=package)
        self.extra = extra


def need(module: str, *, extra: str) -> Any:
    """The module of a framework, by its dotted name; `FrameworkMissingError` if it cannot be imported.

    Called inside functions only, so that importing shardckpt imports no framework.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise FrameworkMissingError(package, extra, why=None if missing == package else error) from error
