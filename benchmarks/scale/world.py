"""What lies between ranks and bytes that no simulation in one process has: networks and an object store, as a model.

Nothing here is measured. Every number is a field of `World`, can be set from the command line, and is printed with what
follows from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.scale.jobs import Mesh
from shardckpt.storage.s3 import TRANSFERS

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class World:
    """Assumptions. Rates in bytes per second, latencies in seconds."""

    ranks_per_host: int = 8
    host_rate: float = 12.5e9
    """Of a host to and from the object store (100 Gbit/s)."""
    store_rate: float = 400e9
    """Of the object store, for all hosts together."""
    connection_rate: float = 90e6
    """Of one connection to it."""
    connections: int = TRANSFERS.concurrency
    """Of one rank, at a time."""
    part_nbytes: int = TRANSFERS.part_nbytes
    """Of uploads; `storage_options={"part_nbytes": ...}` changes it."""
    put_latency: float = 0.06
    get_latency: float = 0.03
    """To the first byte."""
    prefix_puts: float = 3500.0
    prefix_gets: float = 5500.0
    """Requests per second that one prefix of keys takes."""
    prefixes: int = 1
    """Over which the keys of a step are spread."""
    message_s: float = 30e-6
    """That the host of the ranks' own store (TCPStore) takes for one operation."""
    message_latency: float = 100e-6
    message_rate: float = 1.2e9
    """Of the host of that store, of whose one thread this is."""
    flat: int = 128
    """Up to so many ranks rank 0 reads each message; of more it reads those of groups, of about the square root."""
    device_rate: float = 20e9
    """From a device's memory to the host's, for each rank."""
    sum_rate: float = 5e9
    """At which a rank makes checksums."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Seconds of the parts of a save or a load, one after the other, beside the least that the bytes alone take."""

    parts: dict[str, float]
    bound_s: float
    requests: int

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """What of the time is that of the bytes."""
        return self.bound_s / self.total_s if self.total_s else 1.0


def with_larger_parts(world: World) -> World:
    """Parts of 64 MiB, of which a rank sends four at a time."""
    return replace(world, part_nbytes=64 * _MIB, connections=4)


def bytes_bound(world: World, mesh: Mesh, nbytes: int) -> float:
    """The least time for that many bytes of all ranks together, by the bandwidth of hosts and store."""
    hosts = math.ceil(mesh.ranks / world.ranks_per_host)
    return max(nbytes / hosts / world.host_rate, nbytes / world.store_rate)


def requests_of_put(world: World, nbytes: int) -> int:
    """That a rank makes for one file."""
    if nbytes <= max(TRANSFERS.whole_nbytes, world.part_nbytes):
        return 1
    return 2 + math.ceil(nbytes / world.part_nbytes)


def requests_of_get(nbytes: int) -> int:
    """For one contiguous range."""
    return max(1, math.ceil(nbytes / TRANSFERS.request_nbytes))


def gathering(world: World, ranks: int, nbytes: int) -> float:
    """A message of each rank to rank 0, `nbytes` in all, by way of the store: three operations for each, and the
    messages of groups once more."""
    rounds = 1 if ranks <= world.flat else 2
    return rounds * world.message_latency + 3 * ranks * world.message_s + rounds * nbytes / world.message_rate


def telling(world: World, ranks: int, nbytes: int) -> float:
    """One message from rank 0 to all."""
    return world.message_latency + ranks * (world.message_s + nbytes / world.message_rate)


def moving(world: World, mesh: Mesh, nbytes: int, *, requests: int, latency: float, per_prefix: float) -> float:
    """All ranks' bytes to or from the object store, in so many requests of each rank."""
    own = nbytes / mesh.ranks
    rounds = math.ceil(requests / world.connections)
    alone = rounds * latency + own / (world.connections * world.connection_rate)
    throttled = requests * mesh.ranks / (per_prefix * world.prefixes)
    return max(alone, bytes_bound(world, mesh, nbytes), throttled)
