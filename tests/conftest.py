"""Fixtures and rules of all tests: nothing is left behind, ranks are processes of a warm pool, some need a machine."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

from shardckpt.testing.pool import ProcessPool
from shardckpt.testing.servers import azurite, gcs
from tests.integrations.forks import Forks
from tests.leaks import held, leaks

pytest_plugins = ("tests.spreading", "tests.scorecard")

_POOLS: pytest.StashKey[list[ProcessPool]] = pytest.StashKey()
"""The pool of this pytest process, once it is made; its descriptors come and go with its processes."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_POOLS] = []
    torch.set_num_threads(1)
    # A machine that is busy is no failure. Tests take the profile as they are imported, which is later.
    hypothesis.settings.register_profile("house", deadline=None)
    hypothesis.settings.load_profile("house")
    # Ignored in a job in the background of a shell; tests press Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    conditions = {
        "gpu": (torch.cuda.is_available(), "needs a CUDA device"),
        "root": (os.getuid() == 0, "needs uid 0"),
    }
    for item in items:
        for marker, (fulfilled, reason) in conditions.items():
            if item.get_closest_marker(marker) is not None and not fulfilled:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is there before the first test stays to the end: no collection looks through it, 0.2 s a time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if threads, open files, child processes or shared memory outlive it (see `tests/leaks.py`)."""
    pools = request.config.stash[_POOLS]
    marker = request.node.get_closest_marker("leaks")
    allowed = {name: value for name, value in marker.kwargs.items() if name != "why"} if marker else {}
    before = held(without=[fileno for pool in pools for fileno in pool.filenos()])
    yield
    left = leaks(before, without=[fileno for pool in pools for fileno in pool.filenos()], **allowed)
    if left:
        pytest.fail("left behind: " + "; ".join(sorted(left)), pytrace=False)


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[ProcessPool]:
    """A warm pool of rank processes: `ranks.run(4, function_of_a_module, *args)`. Four ranks at most, for two cores."""
    with ProcessPool() as pool:
        request.config.stash[_POOLS].append(pool)
        yield pool
        request.config.stash[_POOLS].remove(pool)


@pytest.fixture(scope="session")
def forks(request: pytest.FixtureRequest) -> Iterator[Forks]:
    """Ranks that share what one process has imported, for frameworks (`tests/integrations/forks.py`)."""
    with ProcessPool() as pool:
        request.config.stash[_POOLS].append(pool)
        yield Forks(pool)
        request.config.stash[_POOLS].remove(pool)


@pytest.fixture(scope="session")
def plain_gcsfs() -> None:
    """Google's client, imported so that it does not ask what kind a bucket is, by gRPC, which no emulator speaks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'shardckpt[gcs]'")


@pytest.fixture(scope="session")
def gcs_server(plain_gcsfs: None) -> Iterator[gcs.GcsServer]:
    if not gcs.is_installed():
        pytest.skip("the emulator of GCS is not installed: pip install gcp-storage-emulator")
    with gcs.running() as server:
        yield server


@pytest.fixture(scope="session")
def azure_server() -> Iterator[azurite.BlobServer]:
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install 'shardckpt[azure]'")
    if azurite.program() is None:
        pytest.skip("Azurite is not installed: it needs node and npm, and then `bash launch/setup.sh` installs it")
    with azurite.running() as server:
        yield server


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
