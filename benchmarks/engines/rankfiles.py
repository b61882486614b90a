"""Formats that are one file for each rank, to be loaded by the same rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.engines.seam import Peer, sync
from benchmarks.places import Place


class RankFile(Peer):
    """The file is synced with its folder: the least that makes these formats durable."""

    def save(self, step: int) -> None:
        tensors = dict(self._state.locals())
        if not self.place(step).is_local:
            self._upload(self._file(step), tensors)
            return
        file = self._file(step).path
        file.parent.mkdir(parents=True, exist_ok=True)
        self._write(file, tensors)
        for folder in (file.parent, file.parent.parent) if self._durable else ():
            sync(folder)

    def load(self, step: int) -> None:
        with torch.no_grad():
            into = dict(self._state.locals())
            file = self._file(step)
            if file.is_local:
                self._read(file.path, into)
            else:
                self._download(file, into)

    def _file(self, step: int) -> Place:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return self.place(step) / f"rank_{rank}"

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _upload(self, file: Place, tensors: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _download(self, file: Place, into: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError


class TorchSave(RankFile):
    """`torch.save`; loaded by `torch.load(mmap=True)` and a copy, the quickest way it has."""

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with open(path, "wb") as file:
            torch.save(tensors, file)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        loaded = torch.load(path, mmap=True, weights_only=True)
        for name, tensor in into.items():
            tensor.copy_(loaded[name])

    def _upload(self, file: Place, tensors: dict[str, torch.Tensor]) -> None:
        fs, path = file.file_system()
        with fs.open(path, "wb") as stream:
            torch.save(tensors, stream)

    def _download(self, file: Place, into: dict[str, torch.Tensor]) -> None:
        fs, path = file.file_system()
        with fs.open(path, "rb") as stream:
            loaded = torch.load(stream, weights_only=True)
        for name, tensor in into.items():
            tensor.copy_(loaded[name])


class Safetensors(RankFile):
    """safetensors' `save_file`, and its mapped tensors copied to their places."""

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.detach() for name, tensor in tensors.items()}, path)
        if self._durable:
            sync(path)

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name, tensor in into.items():
                tensor.copy_(file.get_tensor(name))

    def _upload(self, file: Place, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        fs, path = file.file_system()
        fs.pipe_file(path, save({name: tensor.detach() for name, tensor in tensors.items()}))

    def _download(self, file: Place, into: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import load

        fs, path = file.file_system()
        loaded = load(fs.cat_file(path))
        for name, tensor in into.items():
            tensor.copy_(loaded[name])
