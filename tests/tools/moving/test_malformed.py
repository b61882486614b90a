"""Every importer with every file of its folders spoilt in every way: one error of ours, which names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from shardckpt.errors import CheckpointError
from shardckpt.tools.moving.folders import open_source
from tests.hostile.attacks import PICKLES, zip_with
from tests.hostile.dtensors import files
from tests.hostile.watch import watching
from tests.tools.moving.reading import state_of
from tests.tools.moving.test_foreign_folders import MODEL, OPTIMIZER, SCHEDULER, save_trainer


def safetensors(folder: Path) -> None:
    save_file(MODEL, folder / "model.safetensors")


def safetensors_index(folder: Path) -> None:
    for number, (name, value) in enumerate(MODEL.items(), 1):
        save_file({name: value}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(MODEL, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def bin_index(folder: Path) -> None:
    for number, (name, value) in enumerate(MODEL.items(), 1):
        torch.save({name: value}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{number}-of-00002.bin" for number, name in enumerate(MODEL, 1)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def torch_save(folder: Path) -> None:
    torch.save({"model": MODEL, "optimizer": OPTIMIZER}, folder / "last.pt")


def beside_a_model(folder: Path) -> None:
    safetensors(folder)
    torch.save({"optimizer": OPTIMIZER, "lr_scheduler": SCHEDULER}, folder / "training_state.pt")


def trainer(folder: Path) -> None:
    save_trainer(folder / "checkpoint-7", ranks=2)
    (folder / "checkpoint-7" / "training_args.bin").unlink()  # which is not read


def lightning(folder: Path) -> None:
    content = {"state_dict": MODEL, "optimizer_states": [OPTIMIZER], "pytorch-lightning_version": "2.6.6"}
    torch.save({**content, "lr_schedulers": [SCHEDULER], "global_step": 3}, folder / "last.ckpt")


def rank_files(folder: Path) -> None:
    (step := folder / "step_3").mkdir()
    for rank, content in enumerate(files()):
        (step / f"rank_{rank}.pt").write_bytes(content)
    torch.save({"epoch": 1}, step / "replicated.pt")


def fairseq2_folders(folder: Path) -> None:
    for part, names in {
        "model": ["pp_00/tp_00/sdp_00", "pp_00/tp_00/sdp_01", "pp_01/tp_00/sdp_00", "pp_01/tp_00/sdp_01"],
        "optimizer": ["pp_00/tp_00/sdp_00"],
        "trainer": ["rank_00", "rank_01"],
        "data_reader": ["dp_00"],
    }.items():
        for name in names:
            file = folder / "step_3" / part / f"{name}.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({f"{name[:5]}.w": torch.randn(3, 4)} if part == "model" else {"a": 1}, file)


def torch_checkpointing(folder: Path) -> None:
    for rank, content in enumerate(files()):
        (folder / f"model_{rank}.pt").write_bytes(content)
        torch.save({"position": rank}, folder / f"data_{rank}.pt")


def dcp_folder(folder: Path) -> None:
    dcp.save({"model": MODEL, "step": 3}, storage_writer=dcp.FileSystemWriter(folder))


def dcp_shards(folder: Path) -> None:
    dcp.save(MODEL, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


IMPORTERS: list[Callable[[Path], None]] = [
    *(safetensors, safetensors_index, bin_index, torch_save, beside_a_model, trainer, lightning, rank_files),
    *(fairseq2_folders, torch_checkpointing, dcp_folder, dcp_shards),
]
HOSTILE = [zip_with([("a/data.pkl", attack), ("a/byteorder", b"little")]) for attack in PICKLES[-6:]]
KINDS: dict[str, Callable[[bytes], list[bytes]]] = {
    "empty": lambda content: [b""],
    "cut off": lambda content: [content[: len(content) // 2], content[:-7], content[:9]],
    "nonsense": lambda content: [b"nonsense" * 40, b"[]", b"PK\x03\x04" * 9],
    "zeros": lambda content: [bytes(len(content))],
    "its first bytes are others": lambda content: [bytes(byte ^ 0x55 for byte in content[:64]) + content[64:]],
    "code": lambda content: HOSTILE,
}


def read(folder: Path) -> Any:
    source = open_source(folder)
    try:
        return state_of(source)
    finally:
        source.close()


def refusal(folder: Path) -> str:
    """The error of ours, and no other; none if the folder was read."""
    try:
        read(folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", IMPORTERS, ids=lambda make: make.__name__)
def test_a_spoilt_file_is_one_error_that_names_it(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    read(tmp_path)
    every = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert every
    for path in every:
        content = path.read_bytes()
        for kind, spoil in KINDS.items():
            for spoilt in spoil(content):
                path.write_bytes(spoilt)
                with watching(tmp_path) as seen:
                    told = refusal(tmp_path)
                assert path.name in told, f"{path.name}, {kind}: {told or 'it was read'}"
                assert len(told) < 2000
                assert not seen.ran
        path.unlink()
        refusal(tmp_path)  # a part that is not there is none of the state, if nothing else speaks of it
        path.write_bytes(content)
    read(tmp_path)
