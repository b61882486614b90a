"""The model card, `model.yaml` in the root: what the model is, so that others can build it. On rank 0, any one thread.

It is an asset card of fairseq2, with its keys: name, model_family, model_config (what is to be set in the family's
default), tokenizer_ref if there is one, num_shards if there are several. PyYAML is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError, InvalidStateError
from shardckpt.storage.base import Storage

CARD = "model.yaml"
_MOST = 1 << 18
"""Values that a config may hold."""
_MOST_MERGED = 1 << 12
_LONGEST = 4 << 20
"""Bytes of a card: PyYAML reads some tens of kilobytes in a second."""
_PLACE = 400
"""Letters of a place in a config, for messages."""
_DEEPEST = 64
"""Lists and dicts within each other: far from what PyYAML can read by recursion."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model card says."""

    name: str
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """Plain data; only what differs from the family's default needs to be in it."""
    tokenizer: str | None = None
    shards: int = 1
    """Model-parallel shards of each checkpoint: how many model.<shard>.pt there are."""


def write_model_card(
    storage: Storage,
    *,
    family: str,
    config: Mapping[str, Any],
    tokenizer: str | None = None,
    shards: int = 1,
    name: str = "checkpoint",
) -> None:
    """Write the card of the run, or put a new one in its place, atomically.

    `InvalidStateError` for a config that is not plain data (texts, numbers, true, false, null, lists, and dicts of
    them; a tuple becomes a list) and for other arguments of a wrong type; `CheckpointSaveError` if it cannot be stored.
    """
    card: dict[str, Any] = {"name": _text("name", name), "model_family": _text("family", family)}
    card["model_config"] = {"_set_": _plain_dict("config", config)}
    if tokenizer is not None:
        card["tokenizer_ref"] = _text("tokenizer", tokenizer)
    if _count(shards) != 1:
        card["num_shards"] = shards
    content = _encode(card)
    if len(content) > _LONGEST:
        raise InvalidStateError(f"a model card of {len(content)} bytes, more than {_LONGEST}: shorten the config")
    try:
        storage.replace(CARD, content)
    except OSError as error:
        raise CheckpointSaveError(f"the model card was not saved: {error}") from error


def read_model_card(storage: Storage) -> ModelCard:
    """The card of the run. Keys that are not ours are passed over.

    `CheckpointNotFoundError` if there is none, `CheckpointLoadError` if it cannot be read or is not a model card.
    """
    where = f"{storage.url.rstrip('/')}/{CARD}"
    try:
        content = storage.read(CARD)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no model card, {where}: nobody has saved one") from error
    except OSError as error:
        raise CheckpointLoadError(f"the model card {where} cannot be read now: {error}") from error
    try:
        return _decode(content)
    except ValueError as error:
        raise CheckpointLoadError(
            f"{where} is not a model card, or a damaged one: {error}; write it again, or correct it by hand"
        ) from error


def _encode(card: Mapping[str, Any]) -> bytes:
    import yaml

    # 2026-11, PyYAML 6.0.3: with allow_unicode=True a text of one U+0085 comes back as a blank.
    return str(yaml.safe_dump(dict(card), sort_keys=False)).encode()


def _decode(content: bytes) -> ModelCard:
    """`ValueError` for whatever is not a card."""
    import yaml

    class Loader(yaml.SafeLoader):
        """2026-11, PyYAML 6.0.3: mappings that merge two copies of a mapping that merges ... double at each level."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            own = len(node.value)
            super().flatten_mapping(node)
            if len(node.value) > max(own, _MOST_MERGED):
                raise ValueError(f"a mapping that merges others into more than {_MOST_MERGED} entries")

    if len(content) > _LONGEST:
        raise ValueError(f"it has {len(content)} bytes, more than the {_LONGEST} that a model card may have")
    try:
        card = yaml.load(content, Loader)
    except Exception as error:  # malformed YAML leads PyYAML to KeyError, AttributeError, RecursionError, ...
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error
    config = _entry(card, "model_config")
    return ModelCard(
        name=_text("name", _entry(card, "name")),
        family=_text("model_family", _entry(card, "model_family")),
        config=_plain_dict("model_config", _entry(config, "_set_")),
        tokenizer=_text("tokenizer_ref", card["tokenizer_ref"]) if "tokenizer_ref" in card else None,
        shards=_count(card.get("num_shards", 1)),
    )


def _entry(mapping: object, key: str) -> object:
    if type(mapping) is not dict or key not in mapping:
        raise ValueError(f"it has no {key!r} where one belongs")
    return mapping[key]


def _text(what: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidStateError(f"the {what} of a model card is a text, not {_shown(value)}")
    return str(value)


def _shown(value: object) -> str:
    """For a message. Lists and dicts are not printed: few lines of YAML can stand for any number of them."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return f"{str(value)[:80]!r}" if plain else f"a {type(value).__name__}"


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise InvalidStateError(f"the shards of a model card are a number from 1 on, not {_shown(value)}")
    return value


def _plain_dict(where: str, value: object) -> dict[str, Any]:
    """A copy of plain data in dicts and lists of its own; `InvalidStateError`, a `ValueError`, for anything else."""
    if not isinstance(value, Mapping):
        raise _not_plain(where, value, "give a dict; of a dataclass dataclasses.asdict(config)")
    copied: dict[str, Any] = _copied(where, value, 0, iter(range(_MOST)))
    return copied


def _copied(where: str, value: Any, depth: int, left: Iterator[int]) -> Any:
    """`left` has an item for each value that there may still be: few lines of YAML can stand for any number of them."""
    if depth > _DEEPEST:
        raise InvalidStateError(f"{where[:80]}... is nested too deeply for a model card, or holds itself")
    if next(left, None) is None:
        raise InvalidStateError(f"{where}: a model card of more than {_MOST} values")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_copied(f"{where}[{number}]"[:_PLACE], item, depth + 1, left) for number, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise _not_plain(where, value, "store texts, numbers, booleans, None, lists and dicts")
    for key in value:
        if type(key) not in (str, int):
            raise _not_plain(f"a key of {where}", key, "keys are texts or whole numbers")
    return {key: _copied(f"{where}.{key}"[:_PLACE], item, depth + 1, left) for key, item in value.items()}


def _not_plain(where: str, value: object, advice: str) -> InvalidStateError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return InvalidStateError(f"{where} is a {kind}, which a model card cannot hold: {advice}")
