"""What a file's own index says of a region is held against the record before a byte of it is read."""

from __future__ import annotations

import pytest

from shardckpt.engine.loading.fetching.fetch import check_region
from shardckpt.engine.loading.integrity import Region
from shardckpt.format.index import StoredRecord
from shardckpt.format.manifest import TensorEntry

RECORD = StoredRecord("float32", (4, 3), 64, 48, 0)
ENTRY = TensorEntry("float32", (4, 3), 0)


@pytest.mark.parametrize("region", [Region((0, 0), (4, 3)), Region((1, 2), (3, 1)), Region((3, 0), (1, 3))])
def test_a_region_inside_its_record_is_taken(region: Region) -> None:
    check_region(RECORD, region, ENTRY, file="a.pt", name="w")


@pytest.mark.parametrize(
    "region", [Region((1, 0), (4, 3)), Region((0, 1), (4, 3)), Region((2, 0), (3, 3)), Region((0,), (4,))]
)
def test_one_that_leaves_it_is_refused(region: Region) -> None:
    with pytest.raises(ValueError, match=r"a\.pt and the record do not say the same of w"):
        check_region(RECORD, region, ENTRY, file="a.pt", name="w")


def test_another_dtype_and_a_tensor_that_is_not_there_are_refused() -> None:
    for entry in (TensorEntry("float64", (4, 3), 0), None):
        with pytest.raises(ValueError, match="do not say the same"):
            check_region(RECORD, Region((0, 0), (4, 3)), entry, file="a.pt", name="w")
