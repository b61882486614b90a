"""Where an engine saves: a folder of this machine, or any URL that fsspec knows."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shardckpt.storage import redact


@dataclass(frozen=True, slots=True)
class Place:
    """A folder. What stands in a URL before the path stays; what is secret in it is shown nowhere."""

    url: str

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return redact(self.url)

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def path(self) -> Path:
        """Of a local folder."""
        assert self.is_local, f"{self} has no path"
        return Path(self.url)

    def fresh(self) -> Place:
        """A new folder in this one, for one turn."""
        made = self / f"shardckpt-bench-{secrets.token_hex(4)}"
        made.make()
        return made

    def make(self) -> None:
        """Object stores have no folders: what is put makes them."""
        if self.is_local:
            self.path.mkdir(parents=True, exist_ok=True)

    def files(self) -> dict[str, int]:
        """Every file below it, and its bytes."""
        if self.is_local:
            found = sorted(path for path in self.path.rglob("*") if path.is_file())
            return {str(path): path.stat().st_size for path in found}
        fs, path = self.file_system()
        fs.invalidate_cache()
        return {name: int(info["size"]) for name, info in fs.find(path, detail=True).items()}

    def remove(self) -> None:
        """With all that is in it; missing is fine."""
        fs, path = self.file_system()
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)
        if self.is_local:
            os.sync()  # so that nobody measures the end of what was measured before

    def file_system(self) -> tuple[Any, str]:
        """The fsspec file system, and the path in it."""
        fs, path = fsspec.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        return fs, str(path)
