"""How programs arrange a state in one file, and its parts as they are called here. Pure; trees of any leaves. No torch.

Sources: `lightning.pytorch.trainer.connectors.checkpoint_connector.dump_checkpoint`, fairseq2's `save_state`, PyTorch's
tutorial "Saving and Loading a General Checkpoint", `transformers.Trainer._save_rng_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "model_state_dict": "model",
    "state_dict": "model",
    "optimizer_state_dict": "optimizer",
    "scheduler_state_dict": "scheduler",
    "lr_scheduler_state_dict": "scheduler",
}
"""What a part is often called -> what it is called here."""
_PARTS = ("model", "optimizer", "optimizers", *_NAMES)


def as_parts(tree: Any, kind: type) -> dict[str, Any]:
    """A state by parts ("model", "optimizer", ...); `kind` stands for tensors in the tree.

    A dict with tensors in it, and with no part by name, is the state of a model. Nothing is left out.
    """
    if not isinstance(tree, Mapping):
        return {"model": tree}
    has_parts = any(isinstance(tree.get(name), Mapping) for name in (*_PARTS, _text(tree.get("model_key"))))
    if not has_parts and any(isinstance(leaf, kind) for leaf in tree.values()):
        return {"model": tree}
    if "state_dict" in tree and ("pytorch-lightning_version" in tree or "optimizer_states" in tree):
        return _of_lightning(tree)
    return named_parts(tree)


def named_parts(tree: Any) -> dict[str, Any]:
    """A state whose keys are its parts, whatever they hold; `ValueError` for what has no keys."""
    if not isinstance(tree, Mapping):
        raise ValueError("it is no state with parts by name")
    model_key = _text(tree.get("model_key"))  # as fairseq2 notes it, and we do
    names = {**_NAMES, model_key: "model"} if model_key in tree else _NAMES
    named = {key: value for key, value in tree.items() if key != "model_key" or not model_key}
    parts: dict[str, Any] = {}
    for key, value in named.items():
        name = names.get(key, key) if isinstance(key, str) else str(key)
        parts[key if name in parts or (name != key and name in named) else name] = value
    return parts


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


_LISTS = {"optimizer_states": ("optimizer", "optimizers"), "lr_schedulers": ("scheduler", "schedulers")}
"""Of Lightning -> what one of them is called here, and what several are."""


def _of_lightning(tree: Mapping[Any, Any]) -> dict[str, Any]:
    parts = {"model": tree["state_dict"]}
    rest = {key: value for key, value in tree.items() if key != "state_dict"}
    for key, (one, many) in _LISTS.items():
        if type(tree.get(key)) is list:
            those = rest.pop(key)
            parts |= {one: those[0]} if len(those) == 1 else {many: dict(enumerate(those))} if those else {}
    return parts | ({"progress": rest} if rest else {})


def by_parameter(tree: Any) -> Any:
    """The state of an optimizer by the names of parameters, as ours is, if its groups tell them; else as it is.

    They do if it was given `model.named_parameters()`, from torch 2.6 on; otherwise a file has only numbers.
    """
    groups = tree.get("param_groups") if isinstance(tree, Mapping) else None
    state = tree.get("state") if isinstance(tree, Mapping) else None
    if type(groups) is not list or not isinstance(state, Mapping):
        return tree
    names: dict[Any, str] = {}
    for group in groups:
        numbers, named = (group.get("params"), group.get("param_names")) if isinstance(group, Mapping) else (None, None)
        if type(numbers) is not list or type(named) is not list or len(numbers) != len(named):
            return tree
        if not all(type(each) is int for each in numbers) or not all(type(each) is str for each in named):
            return tree
        names |= zip(numbers, named, strict=True)
    if len(set(names.values())) != len(names) or not all(key in names for key in state):
        return tree
    renamed = {names[key]: value for key, value in state.items()}
    return {**tree, "state": renamed, "param_groups": [{**group, "params": group["param_names"]} for group in groups]}


def as_rng(tree: Any) -> Any:
    """The random streams of a `Trainer` as `RngState` has them; anything else as it is."""
    if not isinstance(tree, Mapping) or "cpu" not in tree or "python" not in tree:
        return tree
    rng = {("torch" if key == "cpu" else key): value for key, value in tree.items()}
    if isinstance(rng.get("numpy"), tuple):
        rng["numpy"] = list(rng["numpy"])
    if "cuda" in rng and not isinstance(rng["cuda"], (list, tuple)):
        rng["cuda"] = [rng["cuda"]]
    return rng


def step_of(parts: Mapping[str, Any]) -> int | None:
    """The training step that the state itself tells; None if it does not."""
    progress = parts.get("progress")
    inside = progress if isinstance(progress, Mapping) else {}
    for value in (inside.get("global_step"), parts.get("global_step"), parts.get("step"), parts.get("step_nr")):
        if type(value) is int and value >= 0:
            return value
    return None
