"""Which step of a run is meant. No torch."""

from __future__ import annotations

from shardckpt.errors import CheckpointNotFoundError
from shardckpt.format.layout import parse_aside, parse_step
from shardckpt.format.manifest import Manifest
from shardckpt.run.catalog import Catalog, Entry, read_record
from shardckpt.tools.place import Place


def step_meant(place: Place, step: int | None = None) -> tuple[str, Manifest]:
    """The folder and the record of a step: the one that the place is, else the one of that number, else the newest.

    `CheckpointNotFoundError` if there is no such step, or the place is no step of ours; errors of `Catalog.record`.
    """
    catalog, url = Catalog(place.storage), place.storage.url
    named, aside = parse_step(place.folder), parse_aside(place.folder)
    if place.file or (place.folder and named is None and aside is None):
        what = place.file or place.folder
        raise CheckpointNotFoundError(f"{url}/{what} is no run and no step of one: give one of these")
    if (place.folder or None) and step is not None and step not in (named, aside.step if aside else None):
        raise CheckpointNotFoundError(f"{url}/{place.folder} is not step {step}", step=step)
    if aside is not None:
        return place.folder, read_record(place.storage, Entry(aside.step, place.folder, place.folder))
    if named is None and step is None:
        latest = catalog.latest()
        if latest is None:
            raise CheckpointNotFoundError(f"there is no committed checkpoint in {url}")
        return catalog.record(latest)
    return catalog.record(named if named is not None else step)  # type: ignore[arg-type]
