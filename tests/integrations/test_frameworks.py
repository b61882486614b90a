"""A framework that is not there, or not sound: one clear message."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shardckpt.integrations.frameworks import FrameworkMissingError, need


def test_what_is_there_is_imported() -> None:
    assert need("json", extra="hf") is json


def test_what_is_not_there_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"^this needs no_such_package: pip install 'shardckpt\[hf\]'$") as told:
        need("no_such_package.trainer", extra="hf")
    assert isinstance(told.value, FrameworkMissingError)
    assert (told.value.name, told.value.extra) == ("no_such_package", "hf")


def test_what_is_there_but_lacks_something_itself_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_framework.py").write_text("import what_it_needs_itself")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FrameworkMissingError, match="does not import: No module named 'what_it_needs_itself'"):
        need("half_a_framework", extra="lightning")
    assert "half_a_framework" not in sys.modules
