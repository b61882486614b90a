"""Names and sums: what is made is recognised again, nothing else is."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardckpt.format import layout
from shardckpt.format.checksum import all_from_hex, combine, crc32, from_hex, to_hex

STEPS = st.integers(0, layout.LAST_STEP)
ATTEMPTS = st.text(alphabet="0123456789abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=64)


@given(STEPS)
@example(0)
@example(layout.LAST_STEP)
def test_a_step_folder_is_recognised(step: int) -> None:
    folder = layout.step_folder(step)
    assert layout.parse_step(folder) == layout.parse_step(f"{folder}/") == step
    assert layout.parse_aside(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        "step_",
        "step_-1",
        "step_01",
        "step_00",
        "step_1 ",
        " step_1",
        "step_1\n",
        "step_1.0",
        "step_1e3",
        "step_\u0661",
        "step_\u00b2",
        "step_1_000",
        "step_+1",
        "Step_1",
        "step_1.tmp",
        "xstep_1",
        "a/step_1",
        "step_1/x",
        "step_" + "9" * 19,
        "step_1000000000000000000",
        "",
        "latest",
        "best",
    ],
)
def test_what_is_no_step(name: str) -> None:
    assert layout.parse_step(name) is None


@pytest.mark.parametrize("step", [-1, -(10**9), 10**18, 1 << 70])
def test_a_step_that_no_folder_can_name(step: int) -> None:
    with pytest.raises(ValueError, match="a step is a number from 0"):
        layout.step_folder(step)


@given(STEPS, ATTEMPTS, st.sampled_from(["tmp", "old"]))
def test_an_attempts_folder_is_recognised(step: int, attempt: str, kind: str) -> None:
    folder = layout.aside_folder(step, attempt, kind)
    assert layout.parse_aside(folder) == layout.parse_aside(f"{folder}/")
    assert layout.parse_aside(folder) == layout.Aside(step, attempt, kind, folder)
    assert layout.parse_step(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        "step_1.tmp",
        "step_1..tmp",
        "step_1.short.tmp",
        "step_1.ABCDEFGH.tmp",
        "step_1.abcdefgh.new",
        "step_1.abcdefgh.tmp.tmp",
        "step_1.abcdefgh.tmp\n",
        "step_1.abcd/efgh.tmp",
        "step_1.../../../x.tmp",
        "step_01.abcdefgh.tmp",
        f"step_1.{'a' * 65}.tmp",
    ],
)
def test_what_is_no_attempts_folder(name: str) -> None:
    assert layout.parse_aside(name) is None


@pytest.mark.parametrize(("attempt", "kind"), [("short", "tmp"), ("a/../../b", "tmp"), ("", "old"), ("abcdefgh", "x")])
def test_an_attempts_folder_that_would_not_be_recognised_is_not_made(attempt: str, kind: str) -> None:
    with pytest.raises(ValueError, match="not a name for an attempt"):
        layout.aside_folder(1, attempt, kind)


@given(st.text())
def test_any_text_is_parsed_or_not(name: str) -> None:
    step, aside = layout.parse_step(name), layout.parse_aside(name)
    assert step is None or layout.step_folder(step) == name.rstrip("/")
    assert aside is None or layout.aside_folder(aside.step, aside.attempt, aside.kind) == name.rstrip("/")


def test_new_attempts_are_attempts_and_differ() -> None:
    drawn = {layout.new_attempt() for _ in range(100)}
    assert len(drawn) == 100
    assert all(map(layout.is_attempt, drawn))
    assert not any(map(layout.is_attempt, ("", "1234567", "ABCDEFGHIJ", "12345678\n", "1234567/", "../../../..")))


def test_file_names_by_shard_and_rank() -> None:
    assert (layout.model_file(0, 1), layout.model_file(1, 2)) == ("model.pt", "model.1.pt")
    assert (layout.replicated_file(0, 1), layout.replicated_file(0, 2)) == ("replicated.pt", "replicated.0.pt")
    names = [*(layout.model_file(i, 8) for i in range(8)), *(layout.rank_file(i) for i in range(8))]
    assert len({layout.check_file_name(name) for name in names}) == 16


@pytest.mark.parametrize(
    "name", ["rank_0.pt", "3f0a/model.0.pt", "tokenizer/vocab.json", "..a", "a..b", ".hidden", "é"]
)
def test_names_inside_a_checkpoint(name: str) -> None:
    assert layout.check_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../x",
        "a/..",
        "./a",
        "a/./b",
        "/etc/passwd",
        "//x",
        "a//b",
        "a/",
        "C:x",
        "C:\\x",
        "..\\x",
        "\\\\server\\share",
        "s3://bucket/x",
        "file:///etc/passwd",
        "memory::x",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a?b",
        "a*",
        'a"b',
        "<a>",
        "a|b",
        "a\ud800b",
        "x" * 1025,
        None,
        3,
        ["a"],
        b"a",
    ],
)
def test_names_that_could_point_outside(name: str) -> None:
    with pytest.raises(ValueError, match="file"):
        layout.check_file_name(name)


@given(st.text())
def test_a_name_that_is_let_through_stays_inside(name: str) -> None:
    import os.path
    import posixpath

    try:
        layout.check_file_name(name)
    except ValueError:
        return
    assert posixpath.normpath(f"/root/step_1/{name}") == f"/root/step_1/{name}"
    assert os.path.join("/root", name).startswith("/root/")
    assert ":" not in name


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_the_sum_of_a_whole_follows_from_the_sums_of_its_pieces(pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    assert combine([(crc32(piece), len(piece)) for piece in pieces]) == (zlib.crc32(content), len(content))


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=5))
def test_sums_as_text(crcs: list[int]) -> None:
    assert [from_hex(to_hex(crc)) for crc in crcs] == crcs
    text = "".join(map(to_hex, crcs))
    assert len(text) == 8 * len(crcs)
    assert all_from_hex(text, len(crcs)) == tuple(crcs)


@pytest.mark.parametrize(
    "text",
    ["", "0", "1234567", "123456789", "0x123456", "+1234567", "-1234567", "1_234567", " 1234567", "DEADBEEF", 7, None],
)
def test_what_is_no_sum(text: object) -> None:
    with pytest.raises(ValueError, match="CRC-32"):
        from_hex(text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CRC-32"):
        all_from_hex(text, 1)  # type: ignore[arg-type]
