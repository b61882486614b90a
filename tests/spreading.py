"""The order in which the workers of xdist do the tests: next to each other in it are tests of different folders.

Tests of some folders wait most of their time, for deadlines and for what was killed; those of others compute. In the
order of their names all workers would be in the same folder at once: all would wait, and later get in each other's way.
Alone, without xdist, the order is that of the names.
"""

from __future__ import annotations

import hashlib

import pytest

SERVERS = {"azure_server", "gcs_server"}
"""Fixtures that take a second or more to make; who needs them is on one worker."""


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups; after `scorecard.py`, which is registered later
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        group = together(item)
        if group and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
        _name(item)
    items.sort(key=place)  # which leaves the tests of a group next to each other, and in their order


def together(item: pytest.Item) -> str:
    """The group of tests that share what is made for all of them; "" of a test that shares nothing."""
    made: dict[str, list[pytest.FixtureDef[object]]] = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    if SERVERS & made.keys():
        return "servers"
    return item.nodeid.partition("::")[0] if any(each[-1].scope == "module" for each in made.values()) else ""


def _name(item: pytest.Item) -> None:
    """Tell the scheduler of a test's group, by its id; xdist 3.8 does so where pytest 9.2 does not look any more."""
    marker = item.get_closest_marker("xdist_group")
    if marker is not None and hasattr(item, "_id"):
        from _pytest.nodeid import coerce_node_id

        item._id = coerce_node_id(f"{item.nodeid}@{marker.args[0]}")


def place(item: pytest.Item) -> float:
    """Anywhere between 0, the first, and 1, but the same on all workers; what takes long is not among the last."""
    group = item.get_closest_marker("xdist_group")
    name = group.args[0] if group else item.nodeid
    last = 0.5 if group else 0.8 if item.get_closest_marker("slow") else 1.0
    return last * int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
