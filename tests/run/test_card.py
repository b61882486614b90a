"""The model card: fairseq2's keys, plain data, written whole or not at all, and never believed when it is read."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardckpt.errors import CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError, InvalidStateError
from shardckpt.run.card import CARD, ModelCard, read_model_card, write_model_card
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, on
from tests.run.making import commit

CONFIG = {"model_dim": 4096, "norm_eps": 1e-5, "layers": [{"heads": 32}, {"heads": 8}], "tied": True, "rope": None}
TEXTS = st.text(st.characters(), max_size=8)
NAMES = TEXTS.filter(bool)
SCALARS = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | TEXTS
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.integers(-9, 9), inner, max_size=4),
    max_leaves=12,
)


def test_it_has_the_keys_of_fairseq2_in_their_order(storage: Storage) -> None:
    write_model_card(storage, family="llama", config=CONFIG, tokenizer="llama3", shards=4, name="mine")
    text = storage.read(CARD).decode()
    assert yaml.safe_load(text) == {
        "name": "mine",
        "model_family": "llama",
        "model_config": {"_set_": CONFIG},
        "tokenizer_ref": "llama3",
        "num_shards": 4,
    }
    top = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert top == ["name", "model_family", "model_config", "tokenizer_ref", "num_shards"]
    assert read_model_card(storage) == ModelCard("mine", "llama", CONFIG, "llama3", 4)


def test_what_is_not_given_is_not_said(storage: Storage) -> None:
    write_model_card(storage, family="llama", config={})
    assert yaml.safe_load(storage.read(CARD)) == {
        "name": "checkpoint",
        "model_family": "llama",
        "model_config": {"_set_": {}},
    }
    assert read_model_card(storage) == ModelCard("checkpoint", "llama", {})


def test_a_new_card_takes_the_place_of_the_old_and_is_no_step(storage: Storage) -> None:
    commit(storage, 5)
    write_model_card(storage, family="llama", config=CONFIG)
    write_model_card(storage, family="mistral", config={})
    assert read_model_card(storage).family == "mistral"
    assert storage.list() == [CARD, "step_5/"]
    assert Catalog(storage).steps() == [5]


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(TEXTS, PLAIN, max_size=4), TEXTS.filter(bool), st.none() | TEXTS.filter(bool), st.integers(1, 99)
)
@example({"on": "yes", "no": "1e3", "~": "null", "2001-01-01": "12:30:45", "<<": "=", "": "- a"}, "y", "0x1", 1)
@example(
    {"a": [math.inf, -math.inf, -0.0, 1e300, 5e-324], "b": "\x85\u2028\ufeff\x00", "c": "\U0001f600"}, "f", None, 1
)
def test_what_is_written_is_read_again(config: dict[str, Any], family: str, tokenizer: str | None, shards: int) -> None:
    storage = MemoryObjects()
    write_model_card(storage, family=family, config=config, tokenizer=tokenizer, shards=shards)
    assert read_model_card(storage) == ModelCard("checkpoint", family, config, tokenizer, shards)


def nested(levels: int) -> dict[str, Any]:
    config: dict[str, Any] = {"a": []}
    for _ in range(levels - 2):
        config = {"a": config}
    return config


def test_what_is_nested_as_deeply_as_is_allowed_is_read_again() -> None:
    storage = MemoryObjects()
    write_model_card(storage, family="f", config=nested(65))
    assert read_model_card(storage).config == nested(65)
    with pytest.raises(InvalidStateError, match="too deeply"):
        write_model_card(storage, family="f", config=nested(66))


def test_a_value_that_is_used_twice_is_written_twice() -> None:
    storage, shared = MemoryObjects(), [1, 2]
    write_model_card(storage, family="f", config={"a": shared, "b": (shared, ())})
    assert b"&" not in storage.read(CARD), "no anchors, which people and other programs stumble over"
    assert read_model_card(storage).config == {"a": [1, 2], "b": [[1, 2], []]}


@dataclasses.dataclass
class Config:
    layers: int = 2


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(), "dataclasses.asdict"),
        ([1, 2], "config is a list"),
        ({"a": [{}, {"b": Config()}]}, r"config\.a\[1\]\.b is a .*Config"),
        ({"a": {1, 2}}, r"config\.a is a set"),
        ({"a": b"bytes"}, r"config\.a is a bytes"),
        ({"a": {2.5: 1}}, r"a key of config\.a is a float"),
        ({(1,): 1}, "a key of config is a tuple"),
        ({"a": LOOP}, "holds itself"),
        ({"a": [0] * (1 << 18)}, "more than"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_that_is_not_plain_data_is_refused_and_the_old_card_stays(config: Any, said: str) -> None:
    storage = MemoryStorage()
    write_model_card(storage, family="f", config=CONFIG)
    with pytest.raises(InvalidStateError, match=said) as caught:
        write_model_card(storage, family="f", config=config)
    assert len(str(caught.value)) < 1000
    assert read_model_card(storage).config == CONFIG


@pytest.mark.parametrize(
    "other", [{"family": ""}, {"family": 3}, {"name": None}, {"tokenizer": 3}, {"shards": 0}, {"shards": True}]
)
def test_other_arguments_of_a_wrong_kind_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidStateError):
        write_model_card(MemoryObjects(), **{"family": "f", "config": {}, **other})


@pytest.mark.parametrize("lost", [False, True])
def test_a_card_that_cannot_be_stored_or_read_is_told(storage: Storage, lost: bool) -> None:
    with pytest.raises(CheckpointNotFoundError, match=CARD):
        read_model_card(storage)
    with pytest.raises(CheckpointSaveError, match="injected"):
        write_model_card(FailingStorage(storage, on("replace"), after=lost), family="f", config={})
    write_model_card(storage, family="f", config={})
    with pytest.raises(CheckpointLoadError, match=r"injected"):
        read_model_card(FailingStorage(storage, on("read")))


GOOD = "name: n\nmodel_family: f\nmodel_config: {_set_: {a: 1}}\n"
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "name: [",
        "\x00",
        GOOD.replace("model_family: f\n", ""),
        GOOD.replace("name: n", "name: 3"),
        GOOD.replace("_set_", "_del_"),
        GOOD.replace("{_set_: {a: 1}}", "llama"),
        GOOD.replace("{a: 1}", "[1]"),
        GOOD.replace("{a: 1}", "{a: 2001-01-01}"),
        GOOD.replace("{a: 1}", "&loop {a: *loop}"),
        GOOD.replace("{a: 1}", "{a: !!python/object/apply:os.system ['true']}"),
        GOOD.replace("{a: 1}", "{a: !!timestamp x}"),
        GOOD.replace("{a: 1}", "{a: !!bool x}"),
        GOOD.replace("{a: 1}", "{a: 2001-99-99}"),
        GOOD.replace("{a: 1}", "{? {b: 1} : 2}"),
        GOOD.replace("{a: 1}", "[" * 3000),
        GOOD + "num_shards: 0",
        GOOD + "num_shards: many",
        GOOD + "tokenizer_ref: 3",
        BOMB + GOOD.replace("{a: 1}", "{a: *a11}"),
    ],
    ids=lambda text: repr(text[-40:]),
)
def test_a_damaged_card_is_an_error_that_says_where_and_what_to_do(text: str) -> None:
    storage = MemoryObjects("run")
    storage.put(CARD, [text.encode()])
    with pytest.raises(CheckpointLoadError, match=r"mem://run/model\.yaml .*write it again"):
        read_model_card(storage)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text("&*!{}[]:-?|>'\"%@`#, \nab019.~<=", max_size=40).map(str.encode), st.booleans())
def test_any_content_is_a_card_or_an_error_of_the_tree(content: bytes, after: bool) -> None:
    storage = MemoryObjects()
    storage.put(CARD, [GOOD.encode() + content if after else content])
    try:
        card = read_model_card(storage)
    except CheckpointLoadError:
        return
    write_model_card(storage, family=card.family, config=card.config, name=card.name, shards=card.shards)
    assert read_model_card(storage).name == card.name


def test_what_others_have_put_into_the_card_is_passed_over() -> None:
    storage = MemoryObjects()
    storage.put(CARD, [(GOOD + "checkpoint: file://x\nbase: [y]\n").encode()])
    assert read_model_card(storage) == ModelCard("n", "f", {"a": 1})


def test_nothing_here_imports_torch_and_only_a_card_imports_yaml() -> None:
    modules = "card, catalog, deletion, history, leftovers, prune, retention, scores"
    code = f"from shardckpt.run import {modules}\nimport sys\nassert not {{'torch', 'yaml'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
