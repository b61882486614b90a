"""Files of tensors to fetch from, without a checkpoint around them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from shardckpt.engine.loading.fetching.fetch import Need
from shardckpt.engine.loading.integrity import Region
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox, StoredRecord
from shardckpt.format.placement import Box
from shardckpt.format.record.files import keys_in
from shardckpt.storage import LocalStorage, Read

HERE = keys_in("step_1", ())
PATIENT = timedelta(seconds=30)


def write(folder: Path, name: str, tensors: list[torch.Tensor], *, gap: int = 100) -> list[StoredRecord]:
    """A file of these tensors, each on a cache line, with other bytes between them."""
    content, records = bytearray(b"head"), []
    for tensor in tensors:
        content += b"-" * (gap + -(len(content) + gap) % 64)
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""
        dtype = str(tensor.dtype).removeprefix("torch.")
        records.append(StoredRecord(dtype, tuple(tensor.shape), len(content), len(raw), crc32(raw)))
        content += raw
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content + b"tail")
    return records


def need(file: str, record: StoredRecord, region: Region | None = None) -> Need:
    shape = record.shape
    zeros = (0,) * len(shape)
    return Need(file, StoredBox("w", 0, shape, Box(zeros, shape, zeros)), region or Region(zeros, shape), zeros, 0)


class Summing(LocalStorage):
    """As S3 does it."""

    def read_summed(self, reads: Sequence[Read]) -> list[int]:
        self.read_into(reads)
        return [crc32(read.into) for read in reads]
