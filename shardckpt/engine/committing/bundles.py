"""The receipts of many ranks as one message, in which what they hold alike is said once, and not once for each rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardckpt.engine.saving.write import Receipt, decode_receipt

Held = dict[str, dict[str, "str | None"]]
"""By kind of file: key to the digest of its content, of all ranks that hold it; None where they hold different ones."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """All receipts by rank, without the digests, and the keys of which ranks hold different content."""

    receipts: tuple[Receipt, ...]
    differ: tuple[str, ...]


def as_bundle(receipt: Receipt) -> dict[str, Any]:
    """The message of one rank."""
    return {"receipts": [{**receipt.encode(), "digests": {}}], "held": _held(receipt)}


def fold_bundles(bundles: Sequence[Any]) -> dict[str, Any]:
    """One message of several: `Fold`."""
    receipts = [receipt for bundle in bundles for receipt in bundle["receipts"]]
    return {"receipts": receipts, "held": _joined(bundle["held"] for bundle in bundles)}


def open_bundles(bundles: Sequence[Any]) -> Bundle:
    """What all messages say. On rank 0. `ValueError` for what is no message of this version."""
    try:
        folded = fold_bundles(bundles)
        return Bundle(tuple(map(decode_receipt, folded["receipts"])), _without_digest(folded["held"]))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"a receipt is not as this version has it ({reason}): all ranks must run the same") from error


def differing(receipts: Iterable[Receipt]) -> tuple[str, ...]:
    """The keys of which files of one kind hold different content on different ranks."""
    return _without_digest(_joined(map(_held, receipts)))


def _held(receipt: Receipt) -> Held:
    kinds = {file.name: file.kind for file in receipt.files}
    return _joined({kinds[file]: dict(keys)} for file, keys in receipt.digests.items())


def _joined(several: Iterable[Mapping[str, Mapping[str, str | None]]]) -> Held:
    joined: Held = {}
    for held in several:
        for kind, keys in held.items():
            known = joined.get(kind)
            if known is None:
                joined[kind] = dict(keys)
            elif known != keys:
                joined[kind] = {**known, **{k: v if known.get(k, v) == v else None for k, v in keys.items()}}
    return joined


def _without_digest(held: Held) -> tuple[str, ...]:
    return tuple(sorted({key for keys in held.values() for key, digest in keys.items() if digest is None}))
