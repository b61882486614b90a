"""FSDP1: which intervals of which parameters lie in this rank's flat parameters. Read, never unsharded.

2026-11, torch 2.13: every state dict of FSDP1 but the local one gathers the parameters, on the training's group and a
module at a time on every rank; the local one holds a collective to make a `ShardedTensor`; and the full one with
`offload_to_cpu` ends in SIGSEGV where the parameters are on the CPU already. So this walks the modules as
`nn.Module.state_dict` does, leaves out FSDP's own hooks, and takes flat parameters apart by the metadata that
`FlatParamHandle` keeps of them. Other hooks, and modules with a `state_dict` of their own, are heeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as torch_state
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from shardckpt.engine.consolidated.blocks import Shape, stretch
from shardckpt.engine.sharding import describe
from shardckpt.errors import InvalidStateError

_FLAT, _WRAPPED, _CHECKPOINTED = "_flat_param", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """A parameter that lies in a flat parameter: what this rank has of it, as boxes in live memory."""

    dtype: torch.dtype
    shape: Shape
    """Of the whole parameter."""
    pieces: tuple[tuple[Shape, torch.Tensor], ...]
    """Offsets in the whole parameter, and the elements from there on."""
    holders: str
    """A name for the ranks that together hold the whole: the same on all of them."""
    mine: bool
    """Whether this rank stores what it has; if not, another one that has the same does (HYBRID_SHARD, NO_SHARD)."""
    assumed: bool
    """Whether those are only taken to have the same."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a registered parameter lies: number `number` of a flat parameter, or the flat parameter itself (None)."""

    wrapper: FullyShardedDataParallel
    handle: Any
    number: int | None


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether any part of the model is wrapped in FSDP1."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def flat_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """(the model's state by plain name, with a `FlatTensor` for what lies in flat parameters; the names of tied entries
    with the first of each). On the training's thread; nothing is communicated."""
    raw: dict[str, Any] = {}
    _walk(model, raw, "")
    places, dtypes = _places(model), _dtypes_of_buffers(model)
    state: dict[str, Any] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, value in raw.items():
        for name, identity, entry in _entries(model, key, value, places.get(id(value))):
            state[name] = entry.to(dtypes[id(value)]) if id(value) in dtypes else entry
            if isinstance(entry, (torch.Tensor, FlatTensor)) and first.setdefault(identity, name) != name:
                ties[name] = first[identity]
    return state, ties


def _walk(module: nn.Module, into: dict[str, Any], prefix: str) -> None:
    """As `nn.Module.state_dict`, without the hooks of FSDP1."""
    if type(module).state_dict is not nn.Module.state_dict and not has_flat_parameters(module):
        module.state_dict(destination=into, prefix=prefix, keep_vars=True)
        return
    for hook in module._state_dict_pre_hooks.values():
        if not _is_fsdp(hook):
            hook(module, prefix, True)
    module._save_to_state_dict(into, prefix, True)
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, into, f"{prefix}{name}.")
    for hook in module._state_dict_hooks.values():
        changed = None if _is_fsdp(hook) else hook(module, into, prefix, {"version": module._version})
        if changed is not None and changed is not into:
            into.clear()
            into.update(changed)


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _places(model: nn.Module) -> dict[int, _Place]:
    """By the identity of the parameter as it is registered now."""
    found: dict[int, _Place] = {}
    for module in model.modules():
        handle: Any = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:
            continue
        assert isinstance(module, FullyShardedDataParallel)
        found[id(handle.flat_param)] = _Place(module, handle, None)
        if handle._use_orig_params:
            for owner, name, number in _owners(handle.flat_param):
                found[id(getattr(owner, name))] = _Place(module, handle, number)
    return found


def _owners(param: Any) -> Iterator[tuple[nn.Module, str, int]]:
    """(module, name there, number in the flat parameter) of all parameters, the tied ones last."""
    numbers = {}
    for number, info in enumerate(param._param_infos):
        numbers[info.module_name, info.param_name] = number
        yield info.module, info.param_name, number
    for shared in param._shared_param_infos:
        yield shared.module, shared.param_name, numbers[shared.prim_module_name, shared.prim_param_name]


def _dtypes_of_buffers(model: nn.Module) -> dict[int, torch.dtype]:
    """By identity: what buffers were before FSDP cast them for mixed precision, and are again in every state dict."""
    found: dict[int, torch.dtype] = {}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._mixed_precision_enabled_for_buffers():
            for name, buffer in module.named_buffers():
                clean = _clean(name)
                if clean in module._buffer_name_to_orig_dtype and clean not in module._ignored_buffer_names:
                    found[id(buffer)] = module._buffer_name_to_orig_dtype[clean]
    return found


def _entries(model: nn.Module, key: str, value: Any, place: _Place | None) -> Iterator[tuple[str, Any, Any]]:
    """(plain name, what tied entries have in common, entry) of what stands under one key of the walk."""
    if place is None:
        yield _plain(model, key), id(value), value
    elif place.number is not None:
        yield _plain(model, key), (id(place.handle), place.number), _interval(place, place.number, value)
    else:
        param, prefix = place.handle.flat_param, _prefix(model, key)
        paths = [info.module_name for info in (*param._param_infos, *param._shared_param_infos)]
        for path, (_, name, number) in zip(paths, _owners(param), strict=True):
            clean = prefix + _clean(f"{path}.{name}" if path else name)
            yield clean, (id(place.handle), number), _interval(place, number, None)


def _interval(place: _Place, number: int, registered: Any) -> FlatTensor:
    """This rank's interval of one parameter. `registered`: the original parameter, where FSDP keeps it."""
    param = place.handle.flat_param
    shape, strides, info = tuple(param._shapes[number]), param._strides[number], param._shard_param_infos[number]
    local = _elements(place.handle, number, registered)
    # A parameter that is dense but not row-major lies flat in the order of its memory.
    order = list(range(len(shape)))
    if not param._contiguities[number]:
        order.sort(key=lambda d: -strides[d])
    back = [order.index(d) for d in range(len(shape))]
    whole, base, holders = _within_mesh(place, number)
    pieces, at, start = [], 0, info.intra_param_start_idx if info.in_shard else 0
    for block in stretch(tuple(shape[d] for d in order), start, start + local.numel()):
        piece = local[at : at + block.numel].view(block.lengths).permute(back)
        pieces.append((tuple(block.offsets[d] + base[i] for i, d in enumerate(back)), piece))
        at += block.numel
    hybrid = getattr(place.wrapper, "_inter_node_pg", None)
    mine, assumed = hybrid is None or hybrid.rank() == 0, False
    if not place.handle.uses_sharded_strategy:
        mine, assumed = place.handle.process_group.rank() == 0, True
    return FlatTensor(local.dtype, whole, tuple(pieces), holders, mine, assumed)


def _elements(handle: Any, number: int, registered: Any) -> torch.Tensor:
    """This rank's elements of a parameter, flat: of the original parameter if somebody has given it other memory, which
    FSDP takes over only when it next gathers; else of the flat parameter."""
    param, info = handle.flat_param, handle.flat_param._shard_param_infos[number]
    # While it is gathered, the flat parameter shows other memory than that of its shard.
    shard = param.data if param.data.numel() == param._sharded_size.numel() else param._local_shard
    if not info.in_shard:
        return torch.empty(0, dtype=shard.dtype)
    if (
        isinstance(registered, torch.Tensor)
        and not isinstance(registered, DTensor)
        and not handle._skipped_use_sharded_views
        and registered.numel() == info.numel_in_shard
        and registered.is_contiguous()
        and param._contiguities[number]
    ):
        return registered.detach().view(-1)
    local: torch.Tensor = shard.detach()[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return local


def _within_mesh(place: _Place, number: int) -> tuple[Shape, Shape, str]:
    """(shape of the whole parameter, where what FSDP shards begins in it, a name for those that hold the whole).

    With tensor parallelism FSDP shards the local parts of DTensors.
    """
    param, spec = place.handle.flat_param, place.handle.flat_param._param_extensions[number]
    shape, name = tuple(param._shapes[number]), param._fqns[number]
    holders = f"fsdp {min(dist.get_process_group_ranks(place.handle.process_group))}"
    if spec is None:
        return shape, (0,) * len(shape), holders
    like = DTensor.from_local(
        torch.empty(shape, device="meta"), spec.mesh, spec.placements, run_check=False, shape=spec.shape,
        stride=spec.stride,
    )  # fmt: skip
    sharding = describe(name, like)
    assert sharding is not None
    boxes = sharding.boxes(tuple(spec.shape))
    if len(boxes) > 1:
        raise InvalidStateError(f"{name} lies in {len(boxes)} separate pieces of a flat parameter of FSDP1; use FSDP2")
    cut = any(not placement.is_replicate() for placement in spec.placements)
    return tuple(spec.shape), boxes[0].offsets if boxes else (0,) * len(shape), "tp" if cut else holders


def _plain(model: nn.Module, key: str) -> str:
    """The name that `get_model_state_dict` gives the entry (see `state._plain_name`)."""
    path, _, last = key.rpartition(".")
    if last == _EXTRA_STATE:  # torch looks for an attribute of that name, and fails below FSDP
        module = _name_of_module(model, path)
        return f"{module}.{last}" if module else last
    names = torch_state._get_fqns(model, _clean(key))
    assert len(names) == 1, f"{key} stands for {names}"
    return next(iter(names))


def _prefix(model: nn.Module, key: str) -> str:
    """What comes before the names in a flat parameter of this key."""
    name = _name_of_module(model, key.removesuffix(_FLAT).removesuffix("."))
    return f"{name}." if name else ""


def _name_of_module(model: nn.Module, path: str) -> str:
    clean = _clean(f"{path}.").removesuffix(".")
    if "." not in clean:  # which torch takes as it is
        return "" if clean == "_orig_mod" and hasattr(model, clean) else clean
    return next(iter(torch_state._get_fqns(model, clean)))


def _clean(name: str) -> str:
    return name.replace(_WRAPPED, "").replace(_CHECKPOINTED, "")
