"""PyTorch's own DCP scenarios with our writer and reader in place of torch's, and with our reader behind its writer.

Left out: models on GPUs; streams that an extension of torch's writer transforms (`Rot13`, zstd: our reader refuses
them); `io.BytesIO` as a value with our writer, which stores nothing that `weights_only` loading refuses (our reader
reads it); `use_collectives=False`; staging and cached plans (`test_state_dict_stager.py`, parts of `test_planner.py`);
`validate_checkpoint_id` choosing a storage without being given one; safetensors (`test_hf_storage.py`). Asynchronous
saves are in `tests/engine/test_dcp_ranks.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.testing.pool import ProcessPool
from tests.distributed.dcp_scenarios import EVERY, Way

pytestmark = pytest.mark.xdist_group("dcp_scenarios")


def play(rank: int, world: int, folder: Path, name: str, root: Path) -> None:
    for kind in ("ours", "torch"):
        EVERY[name][1](Way(kind, root))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.sampled(2)
def test_scenario(ranks: ProcessPool, tmp_path: Path, name: str) -> None:
    ranks.run(EVERY[name][0], play, name, tmp_path)
