"""What the tensors of a model with adapters of PEFT are, by their names, and what they are called without. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardckpt.errors import InvalidStateError

_PREFIX = "base_model.model."
"""`PeftModel.base_model` is the tuner, and its `model` the model that was given."""
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<what>\w+)\.(?P<adapter>[^.]+)(?:\.(?P<kind>weight|bias))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(?P<rest>.+)")
_BASE = re.compile(r"(?P<module>.+)\.base_layer\.(?P<rest>.+)")
_OF_PEFT = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|token_adapter)(\.|$)")
_SHOWN = 5


@dataclass(slots=True)
class Pair:
    """What one adapter has beside one module: names of tensors, empty where there is none."""

    module: str
    """As the base calls it."""
    a: str = ""
    b: str = ""
    bias: str = ""
    """Of B."""
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A model without its adapters."""

    adapter: str
    kept: Mapping[str, str]
    """Name of each tensor and value that is left -> what it was called with the adapters; in the order of the state."""
    weights: Mapping[str, Pair]
    """Name of each weight that the adapter changes."""
    biases: Mapping[str, Pair]


@dataclass(slots=True)
class _Sorted:
    pairs: dict[str, Pair] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    """Modules that the adapter has a copy of, which takes the place of the original."""


def sort_names(names: Iterable[str], *, adapter: str | None = None) -> Named:
    """`adapter`: which one; need not be said where there is one. `InvalidStateError` if there is none, or several, or
    tensors that PEFT has beside a base and that are not known here."""
    names = list(names)
    adapter = _chosen(names, adapter)
    found = _of_adapter(names, adapter)
    kept = dict[str, str]()
    for name in names:
        new = _without(name, adapter, found)
        if new is not None and kept.setdefault(new, name) != name:
            raise InvalidStateError(f"{kept[new]} and {name} would both be {new}")
    if left := [new for new in kept if _OF_PEFT.search(new)]:
        raise InvalidStateError(f"{_some(left)}: not known here, so that this adapter is to be merged with PEFT")
    weights, biases = dict[str, Pair](), dict[str, Pair]()
    for pair in found.pairs.values():
        weight, bias = f"{pair.module}.weight", f"{pair.module}.bias"
        if not (pair.a and pair.b and weight in kept):
            raise InvalidStateError(
                f"the adapter {adapter!r} beside {pair.module} is not whole, or its base is missing"
            )
        weights[weight] = pair
        if pair.bias:
            if bias not in kept:
                raise InvalidStateError(f"the adapter {adapter!r} has a bias for {pair.module}, which has none itself")
            biases[bias] = pair
    return Named(adapter, kept, weights, biases)


def _chosen(names: Iterable[str], adapter: str | None) -> str:
    there = sorted({match["adapter"] for name in names if (match := _LORA.fullmatch(name) or _SAVED.fullmatch(name))})
    if not there:
        raise InvalidStateError("there is no adapter in this model: none of its tensors is called like one of PEFT's")
    if adapter is None and len(there) > 1:
        raise InvalidStateError(f"there are several adapters, {_some(there)}: say which")
    if adapter is not None and adapter not in there:
        raise InvalidStateError(f"there is no adapter {adapter!r}, but {_some(there)}")
    return adapter if adapter is not None else there[0]


def _of_adapter(names: Iterable[str], adapter: str) -> _Sorted:
    found, unknown = _Sorted(), list[str]()
    for name in names:
        saved, lora = _SAVED.fullmatch(name), _LORA.fullmatch(name)
        if saved is not None and saved["adapter"] == adapter:
            found.saved.add(saved["module"])
        if lora is None or lora["adapter"] != adapter:
            continue
        module = lora["module"].removeprefix(_PREFIX)
        pair = found.pairs.setdefault(module, Pair(module))
        match lora["what"], lora["kind"]:
            case "A", "weight":
                pair.a = name
            case "B", "weight":
                pair.b = name
            case "B", "bias":
                pair.bias = name
            case "embedding_A", None:
                pair.a, pair.is_embedding = name, True
            case "embedding_B", None:
                pair.b = name
            case _:
                unknown.append(name)
    if unknown:
        raise InvalidStateError(f"{_some(unknown)}: not known here, so that this adapter is to be merged with PEFT")
    return found


def _without(name: str, adapter: str, found: _Sorted) -> str | None:
    """The name that the base itself has for it; None for what is not of the base, or not in force."""
    if _LORA.fullmatch(name):
        return None
    if saved := _SAVED.fullmatch(name):
        if saved["adapter"] != adapter:
            return None
        name = f"{saved['module']}.{saved['rest']}"
    elif original := _ORIGINAL.fullmatch(name):
        if original["module"] in found.saved:
            return None
        name = f"{original['module']}.{original['rest']}"
    elif base := _BASE.fullmatch(name):
        name = f"{base['module']}.{base['rest']}"
    return name.removeprefix(_PREFIX)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''}"
