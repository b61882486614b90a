"""The files of a record in columns, as JSON: see `columns`. No torch.

A column is [least, width, digits]: of every number what it has above the least, in so many bytes, in hexadecimal. All
is checked here, column by column.
"""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardckpt.format.checksum import all_from_hex
from shardckpt.format.index import as_numbers, as_size, as_text, runs_of
from shardckpt.format.layout import check_file_name
from shardckpt.format.record.columns import KINDS, Extents, Family, FileColumns, Numbers, parse_name
from shardckpt.format.record.files import FileEntry, decode_file, encode_file

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def encode_files(files: FileColumns) -> dict[str, Any]:
    """As they stand in the record."""
    families = []
    for family in files.families:
        encoded: dict[str, Any] = {
            "kind": family.kind,
            "name": [family.before, family.after],
            "numbers": runs_of(family.numbers),
        }
        encoded["writer"] = None if tuple(family.writers) == tuple(family.numbers) else _pack(family.writers)
        encoded |= {"nbytes": _pack(family.nbytes), "crc32": _hex(family.crcs)}
        for part, columns in (("index", family.indexes), ("tree", family.trees)):
            encoded[part] = columns and [_pack(columns[0]), _pack(columns[1]), _hex(columns[2])]
        families.append(encoded)
    return {"families": families, "others": [encode_file(file) for file in files.loose]}


def numbers_in(content: Any) -> list[Any]:
    """The lists of numbers in an encoded list of files, not yet checked; they may stand for many."""
    return [family["numbers"] for family in content["families"]] if isinstance(content, dict) else []


def decode_files(content: Any) -> Sequence[FileEntry]:
    """The files from JSON, also of a record that has none in columns. `ValueError` as for `decode_file`, and for
    columns that are not well-formed."""
    if not isinstance(content, dict):
        return tuple([decode_file(entry) for entry in content])
    families = [_decode_family(family) for family in content["families"]]
    names = {(family.before, family.after) for family in families}
    if len(names) != len(families):
        raise ValueError("two families of files are called alike")
    return FileColumns([decode_file(entry) for entry in content["others"]], families)


def _decode_family(content: Mapping[str, Any]) -> Family:
    kind, (before, after) = as_text(content["kind"]), content["name"]
    numbers = as_numbers(content["numbers"])
    count = len(numbers)
    if kind not in KINDS or not count:
        raise ValueError("a family of no files, or of a kind that has none")
    if len(set(numbers)) != count:
        raise ValueError("a file is named twice")
    for number in (min(numbers), max(numbers)):
        name = check_file_name(f"{as_text(before)}{number}{as_text(after)}")
        if parse_name(name) != (before, number, after):
            raise ValueError(f"{name[:80]!r} is not the name of a file of a family")
    writers = numbers if content["writer"] is None else _unpack(content["writer"], count)
    nbytes = _unpack(content["nbytes"], count)
    parts = [_decode_extents(content[part], nbytes) for part in ("index", "tree")]
    return Family(kind, before, after, numbers, writers, nbytes, all_from_hex(content["crc32"], count), *parts)


def _decode_extents(content: Any, sizes: Numbers) -> Extents | None:
    if content is None:
        return None
    at, nbytes, crc = content
    places, lengths = _unpack(at, len(sizes)), _unpack(nbytes, len(sizes))
    if not all(map(operator.le, map(operator.add, places, lengths), sizes)):
        raise ValueError("a part of a file of a family leaves the file")
    return places, lengths, all_from_hex(crc, len(sizes))


def _pack(numbers: Numbers) -> list[Any]:
    least = min(numbers)
    most = max(numbers) - least
    width = next(width for width in (0, 1, 2, 4, 8) if most < 1 << 8 * width) if most else 0
    if not width:
        return [least, 0, ""]
    column = array(_CODES[width], [number - least for number in numbers])
    if sys.byteorder == "little":
        column.byteswap()
    return [least, width, column.tobytes().hex()]


def _unpack(content: Any, count: int) -> Numbers:
    least, width, digits = content
    if type(width) is not int or width not in (0, *_CODES) or len(as_text(digits)) != 2 * width * count:
        raise ValueError("a column of files is not well-formed")
    if not width:
        return [as_size(least)] * count
    column = array(_CODES[width])
    column.frombytes(bytes.fromhex(digits))
    if len(column) != count:
        raise ValueError("a column of files is not well-formed")
    if sys.byteorder == "little":
        column.byteswap()
    as_size(as_size(least) + max(column))
    return [least + above for above in column]


def _hex(numbers: Iterable[int]) -> str:
    column = array("I", numbers)
    if sys.byteorder == "little":
        column.byteswap()
    return column.tobytes().hex()
