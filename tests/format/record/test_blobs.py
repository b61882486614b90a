"""What a record says of blobs: it comes back, and no lie leads anywhere but to a blob."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shardckpt.format.layout import check_blob_key
from shardckpt.format.manifest import LayoutEntry, Manifest, decode_manifest, encode_manifest
from tests.format.record.drawing import blob
from tests.format.record.records import DATA, RECORD, signed

KEY = f"blobs/{'0' * 62}1f/abcdefgh/frozen.pt"
SHARED = replace(
    RECORD,
    files=(*RECORD.files, blob("frozen.pt", "frozen", 0x1F), blob("frozen_rank_1.pt", "frozen_rank", 0x1F)),
    layouts=(*RECORD.layouts, LayoutEntry("frozen"), LayoutEntry("frozen_rank", 0, ("S(0)", "R"))),
)


def changed(number: int, **values: Any) -> bytes:
    content = json.loads(encode_manifest(SHARED))
    content["files"][number] = {k: v for k, v in (content["files"][number] | values).items() if v is not None}
    return signed(content)


def test_it_comes_back_with_a_format_of_its_own() -> None:
    data = encode_manifest(SHARED)
    assert decode_manifest(data) == SHARED
    assert (json.loads(data)["format"], json.loads(DATA)["format"]) == (2, 1)
    assert SHARED.shared_nbytes == 80 == SHARED.nbytes - RECORD.nbytes
    assert SHARED.files[3].key_in("step_1000") == KEY
    assert SHARED.files[0].key_in("step_1000") == "step_1000/model.0.pt"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "frozen.pt",
        "step_1/rank_0.pt",
        "blobs/../x/abcdefgh/frozen.pt",
        f"/{KEY}",
        f"../{KEY}",
        f"{KEY}\n",
        f"{KEY}/../../x",
        KEY.replace("frozen.pt", "manifest.json"),
        KEY.replace("frozen.pt", "frozen.00.pt"),
        KEY.replace("abcdefgh", "abcdefgh.tmp"),
        KEY.replace("abcdefgh", ".."),
        KEY.replace("1f/", "1F/"),
        KEY.replace("1f/", "1/"),
        KEY.replace("blobs", "Blobs"),
        KEY.replace("/", "\\"),
        3,
        [],
        {"a": 1},
    ],
)
def test_no_other_key_is_believed(key: Any) -> None:
    with pytest.raises(ValueError, match="is not the key of a blob"):
        check_blob_key(key)
    with pytest.raises(ValueError, match=r"not the key of a blob|no others, are blobs"):
        decode_manifest(changed(3, blob=key))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (changed(0, blob=KEY), "no others, are blobs"),  # the model's own file, led elsewhere
        (changed(3, blob=None), "no others, are blobs"),
        (changed(3, kind="model"), "no others, are blobs"),
        (changed(3, name="other.pt"), "called otherwise"),
        (changed(3, index=None), "without its index"),
        (changed(3, tree=None), "without its index"),
        (changed(4, name="x/frozen.pt", blob=KEY), "two files lie in one blob"),
        (changed(3, index=[30, 20, "00000000"]), "bytes 30 to 50 of a file of 40"),
    ],
)
def test_lies_about_blobs(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        decode_manifest(data)


def test_the_format_is_that_of_what_is_in_it() -> None:
    for data, number in ((encode_manifest(SHARED), 1), (DATA, 2)):
        with pytest.raises(ValueError, match=r"a record of format . with what only format . has"):
            decode_manifest(signed(json.loads(data) | {"format": number}))


def test_a_value_is_never_frozen() -> None:
    table = replace(SHARED.tables[0], values={"a": "frozen"})
    record: Manifest = replace(SHARED, tables=(table, SHARED.tables[1]))
    with pytest.raises(ValueError, match="only tensors can be frozen"):
        encode_manifest(record)
