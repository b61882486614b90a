"""CUDA (and ROCm, which torch calls by the same names): side streams, events, page-locked memory.

Why nothing here is called that waits for a whole device: training's own kernels are queued there, often a step ahead.

Why no tensor is recorded on the side stream (`record_stream`): that makes the allocator hold memory back until it looks
at events again, and grows what training needs. Instead the plan of the save refers to every source until the save is
over, which is after the last copy has been waited for: so the allocator cannot give the memory to anybody. Where a
save is given up in the middle of a copy, its sources may be freed early: the copy then reads what belongs to somebody
else, changes nothing of it, and ends in an image that is never written. The image in turn is not given back before the
copies into it have been waited for (`Image`). Temporary tensors are made and freed on the side stream, where the
allocator uses them again only in order.

Shards of FSDP2: the state refers to the sharded parameter. To unshard gathers that into other memory, and to reshard
frees that other memory; the shard stays where it is, and only the optimizer writes to it. Asked for its state while it
is unsharded, a module reshards first (FSDP2 does so in `state_dict`).

Why devices are set by `torch.cuda.device`, around streams and waits: a thread begins on device 0, and whatever touches
CUDA there makes a context on it, half a gigabyte for each rank of the machine. It leaves without making one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from shardckpt.engine.saving.devices.room import apart, lockable_nbytes, processors_near
from shardckpt.engine.saving.devices.seam import Mark, Place
from shardckpt.engine.saving.image import raw

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for all devices of this process."""


class CudaMark:
    """An event of a device."""

    def __init__(self, place: torch.device, stream: torch.cuda.Stream) -> None:
        """What is queued on that stream so far."""
        self._place = place
        # blocking: whoever waits sleeps, instead of asking again and again on a core that a data loader could use.
        self.event = torch.cuda.Event(blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        with torch.cuda.device(self._place):
            self.event.synchronize()


class Cuda:
    """One per saver. Several devices in one process are as good as one: each tensor's device decides."""

    def __init__(self, ranks_here: int = 1) -> None:
        """`ranks_here`: of this job, on this machine; they share its memory."""
        self._ranks_here = ranks_here
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._guard = threading.RLock()  # a finaliser may unlock memory in the middle of anything, here too
        self._allowed: int | None = None
        self._locked = 0

    @property
    def are_used(self) -> bool:
        return bool(torch.cuda.is_initialized())

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        return tensor.device if tensor.is_cuda else None

    def mark(self, place: Place) -> Mark:
        device = _device(place)
        return CudaMark(device, torch.cuda.current_stream(device))

    def copy(self, place: Place, after: Mark, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Mark:
        device = _device(place)
        with self._beside(device, after) as side:
            for target, source in zip(targets, sources, strict=True):
                # Conjugated here, on the device: torch would do it on the host, before the bytes have come (2.13).
                plain = raw(source.resolve_conj().resolve_neg())
                raw(target).copy_(plain, non_blocking=True)
            return CudaMark(device, side)

    @contextmanager
    def beside(self, place: Place, after: Mark) -> Iterator[None]:
        with self._beside(_device(place), after):
            yield

    @contextmanager
    def _beside(self, device: torch.device, after: Mark) -> Iterator[torch.cuda.Stream]:
        with torch.cuda.device(device), torch.no_grad():
            with self._guard:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                side = self._streams[device]
            side.wait_event(cast(CudaMark, after).event)
            with torch.cuda.stream(side):
                yield side

    def hold(self, place: Place, mark: Mark) -> None:
        torch.cuda.current_stream(_device(place)).wait_event(cast(CudaMark, mark).event)

    def lock(self, memory: mmap.mmap, place: Place) -> Callable[[], None]:
        device, nbytes = _device(place), len(memory)
        self._take(nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        try:
            apart(lambda: _register(device, address, nbytes), processors=processors_near(_pci_address(device)))
        except BaseException:
            self._put_back(nbytes)
            raise

        def unlock() -> None:
            assert not memory.closed, "it is to be mapped for as long as it is locked"
            apart(lambda: _unregister(device, address))
            self._put_back(nbytes)

        return unlock

    def _take(self, nbytes: int) -> None:
        with self._guard:
            if self._allowed is None:
                self._allowed = lockable_nbytes(self._ranks_here)
            if self._locked + nbytes > self._allowed:
                share = f"{self._allowed / 1e9:.2f} GB, this rank's share of half of the free memory"
                more = f"{nbytes / 1e9:.2f} GB more would be beyond the {share} ({self._ranks_here} ranks here)"
                raise OSError(errno.ENOMEM, more)
            self._locked += nbytes

    def _put_back(self, nbytes: int) -> None:
        with self._guard:
            self._locked -= nbytes


def _device(place: Place) -> torch.device:
    assert isinstance(place, torch.device)
    return place


def _register(device: torch.device, address: int, nbytes: int) -> None:
    with torch.cuda.device(device):
        _check(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE), "cudaHostRegister")


def _unregister(device: torch.device, address: int) -> None:
    with torch.cuda.device(device):
        _check(torch.cuda.cudart().cudaHostUnregister(address), "cudaHostUnregister")


def _check(code: Any, what: str) -> None:
    if int(code) != 0:
        raise OSError(errno.EIO, f"{what} failed: CUDA error {int(code)} ({code})")


def _pci_address(device: torch.device) -> str:
    """As /sys spells it; "" where torch does not tell."""
    properties: Any = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    if not all(hasattr(properties, name) for name in names):
        return ""
    domain, bus, number = (int(getattr(properties, name)) for name in names)
    return f"{domain:04x}:{bus:02x}:{number:02x}.0"
