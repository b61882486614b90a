"""PEFT: which tensors are the adapter's; loads of these alone; a step's adapter as PEFT's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.errors import InvalidStateError
from shardckpt.integrations.frameworks import need
from shardckpt.tools.export import beside
from shardckpt.tools.moving.safetensors_sink import SafetensorsSink
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.place import Where

ADAPTER_CONFIG = "adapter_config.json"
_BUDGET = 64 << 20


def adapter_names(model: Any, *, adapter: str | None = None) -> dict[str, str]:
    """PEFT's name of each tensor of the adapter (the active one, if none is named) -> the model's own name.

    Empty for a model that is none of PEFT's.
    """
    if not hasattr(model, "peft_config"):
        return {}
    peft = need("peft", extra="peft")
    state = model.state_dict()
    own = {id(tensor): name for name, tensor in state.items()}
    name = adapter or model.active_adapters[0]
    given = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return {theirs: own[id(tensor)] for theirs, tensor in given.items() if id(tensor) in own}


def adapter_only(model: Any, *, key: str = "model", adapter: str | None = None) -> LoadPolicy:
    """To load nothing but the adapter: `checkpoints.load(step, {"model": model}, policy=adapter_only(model))`.

    The base is neither read nor looked for. `key` is the model's in the state. `InvalidStateError` for a model without
    adapters. By any rank by itself.
    """
    names = adapter_names(model, adapter=adapter)
    if not names:
        raise InvalidStateError(f"a {type(model).__name__} has no adapter of PEFT: give what get_peft_model returned")
    return LoadPolicy(include=[f"{key}.{own}" for own in names.values()])


def export_adapter(where: Where, to: Path, *, step: int, names: Mapping[str, str], key: str = "model") -> None:
    """Write a step's adapter into a folder that is not there yet, as `PeftModel.from_pretrained` reads it.

    `names` is what `adapter_names` gave. Errors as of `shardckpt.export`. One process.
    """
    with StepSource.open(where, step=step, part=key) as source:
        to.mkdir(parents=True)
        for name, content in beside(source):
            (to / name).write_bytes(content)
        SafetensorsSink(to / "adapter_model.safetensors").write(_Adapter(source, names, key), budget_nbytes=_BUDGET)


class _Adapter:
    """The adapter's tensors of a step, by PEFT's names. A `TensorSource`."""

    def __init__(self, source: TensorSource, names: Mapping[str, str], key: str) -> None:
        self._source = source
        self._saved = {f"{key}.{theirs}": f"{key}.{own}" for theirs, own in names.items()}
        self._key = key

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {theirs: self._source.tensors[own] for theirs, own in self._saved.items() if own in self._source.tensors}

    @property
    def ties(self) -> Mapping[str, str]:
        return {}

    @property
    def tree(self) -> Any:
        return {self._key: {name.removeprefix(f"{self._key}."): TensorName(name) for name in self.tensors}}

    def read(self, windows: Sequence[Window]) -> None:
        self._source.read([Window(self._saved[window.name], window.start, window.into) for window in windows])

    def close(self) -> None:
        self._source.close()
