"""A record is made of receipts only: bytes that nobody has a receipt for, or two ranks have, are never committed."""

from __future__ import annotations

import pytest

from shardckpt.engine.committing.receipts import Merged, compose_manifest
from shardckpt.engine.saving.write import Receipt
from shardckpt.format.layout import new_attempt
from shardckpt.format.manifest import FileEntry, Manifest

FILE = FileEntry("model.pt", 100, 0, "model", 0)
NOTHING = Merged((), (), ())


def compose(*wrote: tuple[int, int] | None, files: tuple[tuple[FileEntry, ...], ...] = ((FILE,),)) -> Manifest:
    """The record where rank i wrote those bytes of the file (None: none of it), and completed `files[i]`."""
    receipts = [
        Receipt(rank, 0, files[rank] if rank < len(files) else (), wrote={"model.pt": span} if span else {})
        for rank, span in enumerate(wrote)
    ]
    return compose_manifest(1, new_attempt(), "2026-01-01T00:00:00+00:00", receipts, NOTHING, {})


@pytest.mark.parametrize("wrote", [((0, 100),), ((40, 100), (0, 40)), ((60, 100), None, (0, 20), (20, 60))])
def test_ranges_that_make_up_the_file_are_recorded(wrote: tuple[tuple[int, int] | None, ...]) -> None:
    assert compose(*wrote).files == (FILE,)


@pytest.mark.parametrize(
    ("wrote", "said"),
    [
        (((50, 100),), "the bytes from 0 to 50 were written twice or by nobody"),
        (((50, 100), (0, 40)), "the bytes from 40 to 50 were written twice or by nobody"),
        (((50, 100), (0, 60)), "the bytes from 50 to 60 were written twice or by nobody"),
        (((0, 100), (0, 100)), "the bytes from 0 to 100 were written twice or by nobody"),
        (((0, 90),), "90 bytes were written, but it should have 100"),
        ((None, None), "0 bytes were written, but it should have 100"),
        (((0, 90), (90, 120)), "120 bytes were written, but it should have 100"),
    ],
)
def test_a_gap_an_overlap_or_a_missing_end_is_no_checkpoint(
    wrote: tuple[tuple[int, int] | None, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        compose(*wrote)


def test_a_file_that_two_ranks_complete_is_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="two ranks wrote the same file"):
        compose((0, 50), (50, 100), files=((FILE,), (FILE,)))


def test_parts_of_a_file_that_nobody_completes_are_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="nobody wrote the end"):
        compose((0, 50), files=())
