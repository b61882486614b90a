"""What PEFT's `adapter_config.json` says of a LoRA adapter, as far as merging needs it. No torch, no PEFT."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from shardckpt.errors import InvalidStateError

ADAPTER_CONFIG = "adapter_config.json"

Given: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
"""The configuration itself, or the file, or the folder that has it."""

_OTHERWISE = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config", "megatron_config", "target_parameters", "trainable_token_indices"),
)
"""What makes an adapter one that is not `W + scale * B @ A`, or that lies in other tensors."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Of one adapter."""

    r: int
    alpha: float
    rslora: bool = False
    """Whether the scale is alpha / sqrt(r), not alpha / r."""
    fan_in_fan_out: bool = False
    """Whether the base's weights are (in, out), as `Conv1D` of transformers has them."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    """By pattern of a module's name, where they differ."""

    def rank_of(self, module: str) -> int:
        """Of the module of this name, as the base calls it."""
        return self.ranks.get(_pattern(self.ranks, module), self.r)

    def scale_of(self, module: str) -> float:
        """What `B @ A` is multiplied by."""
        alpha, rank = self.alphas.get(_pattern(self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def lora_config(given: Given) -> LoraConfig:
    """`InvalidStateError` for what is no configuration of a LoRA adapter, or of one that cannot be merged."""
    found = dict(given) if isinstance(given, Mapping) else _read(Path(given))
    kind = found.get("peft_type")
    if getattr(kind, "value", kind) != "LORA":
        raise InvalidStateError(f"this is the configuration of no LoRA adapter: its peft_type is {kind!r:.40}")
    otherwise = [key for key in _OTHERWISE if found.get(key)]
    if otherwise:
        raise InvalidStateError(f"an adapter with {', '.join(otherwise)} is not merged here: merge it with PEFT")
    ranks, alphas = found.get("rank_pattern") or {}, found.get("alpha_pattern") or {}
    try:
        config = LoraConfig(
            _positive(found["r"]),
            float(found["lora_alpha"]),
            bool(found.get("use_rslora")),
            bool(found.get("fan_in_fan_out")),
            {re.compile(name).pattern: _positive(rank) for name, rank in ranks.items()},
            {re.compile(name).pattern: float(alpha) for name, alpha in alphas.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise InvalidStateError(f"{ADAPTER_CONFIG} lacks something, or has it in another form: {error!r}") from error
    return config


def _read(path: Path) -> dict[str, Any]:
    file = path / ADAPTER_CONFIG if path.is_dir() else path
    try:
        return parsed(file.read_bytes(), str(file))
    except OSError as error:
        raise InvalidStateError(f"{file} cannot be read: {error}") from error


def parsed(content: bytes, name: str) -> dict[str, Any]:
    """`InvalidStateError` for what is no JSON object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidStateError(f"{name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidStateError(f"{name} is no configuration, but a {type(found).__name__}")
    return found


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first that the end of the name is like, as PEFT takes them (`get_pattern_key`)."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a rank is a number from 1 on, not {value!r:.40}")
    return value
