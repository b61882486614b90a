"""What torch and the engine remember of the device meshes of one call must not be met by the next call."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


class Meshes:
    """All meshes that are made in this process from now on, as long as they live. One per process."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()
        self._caches = _known()
        # What is there already is not looked through again and again: 0.1 s a time, and more than that to collect.
        gc.freeze()
        make = DeviceMesh.__init__

        @functools.wraps(make)
        def made(mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
            make(mesh, *args, **kwargs)
            self._alive.add(mesh)

        DeviceMesh.__init__ = made  # type: ignore[assignment, method-assign]

    def forget(self) -> bool:
        """Make torch forget the meshes of a process group that is gone; whether it did.

        Its caches of what an operation makes of a placement hold meshes, and are asked with any mesh that is equal: one
        of the same ranks and names. In the next call's process group the groups have other names, or on some ranks only
        (a process that was replaced has empty caches): a collective then fails, hangs, or speaks to others.
        """
        if not self._alive:
            return True
        _clear_sharding_prop_cache()
        _redistribute.clear_redistribute_planner_cache()
        for cache in (*self._caches, *_caches()):
            cache.cache_clear()
        for _ in range(2):  # a tensor may outlive a first collection with its Python object, and take its mesh along
            gc.collect()
        return not self._alive


def _caches() -> list[functools._lru_cache_wrapper[Any]]:
    """Those of torch's distributed modules and of the engine, functions made inside of functions too."""
    found = [known for known in gc.get_objects() if type(known) is functools._lru_cache_wrapper]
    return [cache for cache in found if str(cache.__module__).startswith(_WHERE)]


def _known() -> list[functools._lru_cache_wrapper[Any]]:
    """The same, in a process that may have been forked since this module was imported."""
    imported = sys.modules.keys() - _MODULES
    return _caches() if any(name.startswith(_WHERE) for name in imported) else _FOUND


_WHERE = ("torch.distributed.", "shardckpt.engine.")
# A look at every object copies the memory of all that was imported, in each process that was forked, 0.08 s: so the
# server of the processes has looked, once.
_FOUND, _MODULES = _caches(), frozenset(sys.modules)
