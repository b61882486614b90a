"""What tests of faults need from the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.nodes import Nodes, NoNodesError, two_nodes


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """Two nodes; `@pytest.mark.parametrize("nodes", ["ipv6"], indirect=True)`: that speak nothing else."""
    try:
        with two_nodes(ipv6=getattr(request, "param", "") == "ipv6") as both:
            yield both
    except NoNodesError as error:
        pytest.skip(f"no network namespaces here: {error}")
