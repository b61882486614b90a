"""What an attacker would put into a file: pickles that call, shares that unfold, archives that lie."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any

from tests.format.restricted.spelling import FLOATS, HEAD, call, laughs, number, tensor, text
from tests.hostile import watch

_SING = f"{watch.__name__}"


class _Reduced:
    def __reduce__(self) -> Any:
        return watch.canary, ("reduced",)


class _WithState:
    def __reduce__(self) -> Any:
        return watch.canary, (), {"a": 1}, iter([1]), iter([(1, 2)])


_CALLS = (
    call(_SING, "canary", text("x")),
    call("os", "system", text("true")),
    call("posix", "system", text("true")),
    call("subprocess", "Popen", text("true")),
    call("builtins", "exec", text("1")),
    call("__builtin__", "eval", text("1")),
    call("builtins", "__import__", text("antigravity")),
    call("builtins", "getattr", text("x"), text("__class__")),
    call("builtins", "open", text("/etc/passwd")),
    call("torch", "load", text("/etc/passwd")),
    call("torch.hub", "load", text("x"), text("y")),
    call("torch.storage", "_load_from_bytes", text("x")),
    call("torch._utils", "_rebuild_parameter", b"N", b"\x88", b"N"),
    call("torch", "Size", b"(" + laughs(40) + b"t"),
    call("torch", "Size", b"(" + number(1 << 61) + b"t"),
    call("__builtin__", "bytearray", number(1 << 40)),
    call("collections", "OrderedDict", b"](" + laughs(40) + b"K\x01\x86e"),
    f"(i{_SING}\ncanary\n".encode(),
    f"(c{_SING}\ncanary\no".encode(),
    f"c{_SING}\ncanary\n)\x81".encode(),
    b"\x8c" + bytes([len(_SING)]) + _SING.encode() + b"\x8c\x06canary\x93)R",
    b"}" + laughs(40) + b"K\x01s",
    b"(" + text("storage") + FLOATS + text("0") + text("cpu") + laughs(40) + b"tQ",
    tensor(1 << 40, (1 << 40,), (1,)),
    tensor(0, (1 << 62, 0, 1 << 62), (0, 1, 1)),
    tensor(4, (1 << 40, 1 << 40), (1, 1)),
    b"]q\x00h\x00a",
    b"X\xff\xff\xff\xff",
    b"Nr\xff\xff\xff\xff",
    b"\x8a\xff",
)
PICKLES: tuple[bytes, ...] = (
    *(HEAD + body + b"." for body in _CALLS),
    *(pickle.dumps({"model": attack()}, protocol=p) for attack in (_Reduced, _WithState) for p in (0, 2, 4)),
)
"""None of them may be read as anything but an error or a harmless value."""


def zip_with(entries: list[tuple[str, bytes]], *, deflate: bool = False) -> bytes:
    """A zip archive with entries of any name, in any number, twice too; symbolic links are `link:` names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name.removeprefix("link:"))
            info.compress_type = archive.compression
            if name.startswith("link:"):
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def lying_directory(archive: bytes, offset: int, size: int) -> bytes:
    """An archive whose first directory entry points to `offset` and claims `size` bytes."""
    content = bytearray(archive)
    at = content.find(b"PK\x01\x02")
    if at >= 0:
        struct.pack_into("<II", content, at + 20, size & 0xFFFFFFFF, size & 0xFFFFFFFF)
        struct.pack_into("<I", content, at + 42, offset & 0xFFFFFFFF)
    return bytes(content)
