"""Where the trainings of these tests keep their checkpoints."""

from __future__ import annotations

from pathlib import Path

from tests.integrations.huggingface.jobs import Place
from tests.storage.s3server import S3Server


def place_in(kind: str, folder: Path, server: S3Server) -> Place:
    if kind == "file":
        return Place(str(folder / "out"), folder / "out")
    return Place(f"s3://{server.bucket}/{folder.name}", folder / "out", server.options)
