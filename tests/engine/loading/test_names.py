"""Patterns and renaming rules, by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.engine.loading.selecting.names import Patterns, Rule
from shardckpt.engine.loading.selecting.selection import Selection

NAMES = st.lists(st.sampled_from(["model", "body", "layers", "0", "10", "a+b", ""]), min_size=1, max_size=4).map(
    ".".join
)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("model", "model.a.b", True),
        ("model", "models.a", False),
        ("model.layers.1", "model.layers.1.weight", True),
        ("model.layers.1", "model.layers.10.weight", False),
        ("model.layers.*", "model.layers.10.weight", True),
        ("model.layers.[12]", "model.layers.2.weight", True),
        ("*.bias", "model.a.bias", True),
        ("*.bias", "bias", False),
        ("MODEL", "model", False),
        ("model.*", "model", False),
    ],
)
def test_a_pattern_is_for_a_name_and_all_below_it(pattern: str, name: str, matches: bool) -> None:
    assert bool(Patterns([pattern]).matching(name)) == matches


@pytest.mark.parametrize(
    ("rules", "own", "saved"),
    [
        ({"a": "b"}, "a.x", "b.x"),
        ({"a": "b"}, "ab.x", "ab.x"),
        ({"a": "b.c.d"}, "a", "b.c.d"),
        ({"m.layers.*.mlp": "m.blocks.*.ffn"}, "m.layers.7.mlp.w", "m.blocks.7.ffn.w"),
        ({"m.layers.*.mlp": "m.blocks.*.ffn"}, "m.layers.7.8.mlp.w", "m.layers.7.8.mlp.w"),
        ({"m.*.*": "*.m.*"}, "m.1.2.w", "1.m.2.w"),
        ({"m": "n", "m.head": "h"}, "m.head.w", "h.w"),
        ({"m.head": "h", "m": "n"}, "m.body.w", "n.body.w"),
        ({"a": "b", "b": "a"}, "b.x", "a.x"),
    ],
)
def test_a_rule_and_back(rules: dict[str, str], own: str, saved: str) -> None:
    selection = Selection(rename=rules)
    assert selection.saved_name(own) == saved
    assert own in selection.own_names(saved)


@settings(max_examples=60, deadline=None)
@given(rules=st.dictionaries(NAMES.filter(bool), NAMES.filter(bool), max_size=3), name=NAMES)
def test_what_is_loaded_from_a_key_is_what_is_called_so(rules: dict[str, str], name: str) -> None:
    selection = Selection(rename=rules)
    assert name in selection.own_names(selection.saved_name(name))
    assert all(selection.saved_name(own) == name for own in selection.own_names(name))


@pytest.mark.parametrize(("own", "saved"), [("a.*", "b"), ("", "b"), ("a", ""), ("a", "*")])
def test_a_rule_has_two_sides_of_one_form(own: str, saved: str) -> None:
    with pytest.raises(ValueError, match="rename"):
        Rule(own, saved)
    with pytest.raises(ValueError, match="rename"):
        sc.LoadPolicy(rename={own: saved})


@pytest.mark.parametrize("wrong", ["model", [""], [3]])
def test_patterns_are_a_list(wrong: object) -> None:
    with pytest.raises(ValueError, match="list of patterns"):
        sc.LoadPolicy(include=wrong)  # type: ignore[arg-type]
