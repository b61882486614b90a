"""Which states a power cut may leave: a model of what file systems keep, and the enumeration of what that allows.

After a prefix of the operations some of them are durable, and each of the others may be or not. Which others, and in
which combinations, is what the models differ in:

- `ORDERED` (ext4 with data=ordered, xfs): changes of names and sizes go into a journal, so the durable ones are a
  prefix of all of them, and any fsync, of whatever, makes all that came before durable. Data that was not synced is
  lost, torn or there, file by file.
- `MINIMAL` (what POSIX promises and no more): each change of a folder's entries that was not followed by an fsync of
  that folder is lost or there by itself, in any combination; so are data and sizes without an fsync of the file.
- `LYING`: names as in `ORDERED`, but a device that has lost data whose fsync had been answered. Nothing can be promised
  here except that what is damaged is told to be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shardckpt.testing.crash.operations import (
    ROOT,
    Allowed,
    Change,
    Data,
    Entries,
    Ledger,
    Mark,
    Operation,
    Recording,
    Size,
    Sync,
)

SECTOR = 512
"""Bytes that a device writes wholly or not at all; a write that was not synced may be torn between two of them."""
_QUIET_ROUNDS = 60
"""Rounds over all prefixes without a new state after which there are taken to be no more."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a file system keeps over a power cut."""

    name: str
    in_order: bool
    """Whether names and sizes become durable in the order in which they were changed, and with any fsync."""
    honest: bool = True
    """Whether data whose fsync was answered is there."""


ORDERED, MINIMAL, LYING = Model("ordered", True), Model("minimal", False), Model("lying", True, honest=False)


@dataclass(frozen=True, slots=True)
class State:
    """What is found when the machine is up again."""

    prefix: int
    """How many operations had been done."""
    files: dict[str, bytes]
    folders: frozenset[str]
    allowed: Allowed


@dataclass(slots=True)
class _Durable:
    """What no power cut takes away any more. Copied before it is changed."""

    folders: dict[int, dict[str, int]]
    contents: dict[int, bytes]

    def copy(self) -> _Durable:
        return _Durable(dict(self.folders), dict(self.contents))

    def apply(self, changes: Sequence[Change]) -> None:
        for folder, name, node in changes:
            names = dict(self.folders.get(folder, {}))
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
            self.folders[folder] = names

    def write(self, operation: Data | Size, keep: Sequence[bool] | None = None) -> None:
        """`keep`: which sectors of the data arrive; all if it is not given."""
        content = self.contents.get(operation.node, b"")
        if isinstance(operation, Size):
            if operation.nbytes > len(content):
                content += bytes(operation.nbytes - len(content))
            elif not operation.grow:
                content = content[: operation.nbytes]
        else:
            for number, start in enumerate(range(0, len(operation.content), SECTOR)):
                if keep is None or keep[number]:
                    content = _put(content, operation.offset + start, operation.content[start : start + SECTOR])
        self.contents[operation.node] = content


def _put(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at].ljust(at, b"\0") + piece + content[at + len(piece) :]


@dataclass(slots=True)
class _Cut:
    """After one prefix: what is durable, and what may be."""

    prefix: int
    durable: _Durable
    allowed: Allowed
    names: list[Entries | Size] = field(default_factory=list)
    """Changes in order; with sizes, where they are journalled as names are."""
    data: list[Data | Size] = field(default_factory=list)


def states(recording: Recording, model: Model, *, count: int, seed: int) -> Iterator[State]:
    """At most `count` different states (by content and by what is allowed then), the same ones for the same seed.

    Every prefix comes in every round: first the extremes (all of what is not durable is there, nothing is, only the
    names, only the data, all but one change, only one change), then samples.
    """
    cuts = list(_cuts(recording, model))
    seen: set[int] = set()
    quiet = 0
    for number in range(count):
        before = len(seen)
        for cut in cuts:
            state = _state(cut, model, number, random.Random(f"{seed}/{cut.prefix}/{number}"), recording)
            if state is None:
                continue
            key = hash((frozenset(state.files.items()), state.folders, frozenset(state.allowed.items())))
            if key not in seen:
                seen.add(key)
                yield state
                if len(seen) == count:
                    return
        quiet = quiet + 1 if len(seen) == before else 0
        if quiet > _QUIET_ROUNDS and number > max((len(cut.names) for cut in cuts), default=0) * 2:
            return


def _cuts(recording: Recording, model: Model) -> Iterator[_Cut]:
    durable = _Durable({node: dict(names) for node, names in recording.folders.items()}, dict(recording.contents))
    ledger, names, data = Ledger(), list[Entries | Size](), list[Data | Size]()
    for prefix, operation in enumerate(recording.operations):
        if isinstance(operation, Mark):
            # Its promise holds for the state that the operations before it left.
            ledger.tell(operation)
        yield _Cut(prefix, durable, ledger.allowed, list(names), list(data))
        if isinstance(operation, Sync):
            durable = durable.copy()
            names, data = _flush(operation.node, durable, names, data, model)
        else:
            _queue(operation, names, data, model)
    yield _Cut(len(recording.operations), durable, ledger.allowed, list(names), list(data))


def _queue(operation: Operation, names: list[Entries | Size], data: list[Data | Size], model: Model) -> None:
    if isinstance(operation, Entries):
        if model.in_order or len({folder for folder, _, _ in operation.changes}) == 1:
            names.append(operation)
        else:  # between two folders: each keeps its own half
            names += [Entries((change,)) for change in operation.changes]
    elif isinstance(operation, Size) and model.in_order:
        names.append(operation)
    elif isinstance(operation, Data | Size):
        data.append(operation)


def _flush(
    node: int, durable: _Durable, names: list[Entries | Size], data: list[Data | Size], model: Model
) -> tuple[list[Entries | Size], list[Data | Size]]:
    """What an fsync of this node makes durable goes; gives what remains."""
    left: list[Entries | Size] = []
    for change in names:
        if isinstance(change, Size):
            durable.write(change)
        elif model.in_order or change.changes[0][0] == node:
            durable.apply(change.changes)
        else:
            left.append(change)
    if not model.honest:
        return left, data
    for piece in data:
        if piece.node == node:
            durable.write(piece)
    return left, [piece for piece in data if piece.node != node]


def _state(cut: _Cut, model: Model, number: int, draw: random.Random, recording: Recording) -> State | None:
    """The state number so-and-so of a cut; None if there is no such one."""
    if not cut.names and not cut.data:
        return _found(cut, cut.durable, recording) if number == 0 else None
    kept = _kept_names(cut, model, number, draw)
    if kept is None:
        return None
    disk = cut.durable.copy()
    for change, keep in zip(cut.names, kept, strict=True):
        if keep and isinstance(change, Size):
            disk.write(change)
        elif keep and isinstance(change, Entries):
            disk.apply(change.changes)
    manners: dict[int, str] = {}
    if number >= 4 and cut.data and draw.random() < 0.5:  # of many files that may be damaged, a single one is
        manners = dict.fromkeys((piece.node for piece in cut.data), "all")
        manners[draw.choice(cut.data).node] = draw.choice(("one lost", "one lost", "torn", "none"))
    for piece in cut.data:
        manner = manners.setdefault(piece.node, _manner(number, draw))
        if isinstance(piece, Size):
            if manner in ("all", "one lost") or (manner == "torn" and draw.random() < 0.5):
                disk.write(piece)
            continue
        disk.write(piece, _sectors(-(-len(piece.content) // SECTOR), manner, draw))
    return _found(cut, disk, recording)


def _kept_names(cut: _Cut, model: Model, number: int, draw: random.Random) -> list[bool] | None:
    """Which of the changes that are not durable are there."""
    count = len(cut.names)
    if number < 4:  # all there; nothing there; only the names; only the data
        return [number in (0, 2)] * count
    if model.in_order:
        there = draw.randint(0, count)
        return [place < there for place in range(count)]
    if number < 4 + 2 * count:
        one, lost = divmod(number - 4, 2)
        return [(place == one) != bool(lost) for place in range(count)]
    share = draw.choice((0.2, 0.5, 0.8))
    return [draw.random() < share for _ in range(count)]


def _manner(number: int, draw: random.Random) -> str:
    if number < 4:
        return "all" if number in (0, 3) else "none"
    return draw.choice(("all", "none", "torn", "one lost"))


def _sectors(count: int, manner: str, draw: random.Random) -> list[bool]:
    """Which sectors of a write are there."""
    if manner == "one lost":
        lost = draw.randrange(max(count, 1))
        return [number != lost for number in range(count)]
    return [manner == "all" or (manner == "torn" and draw.random() < 0.5) for _ in range(count)]


def _found(cut: _Cut, disk: _Durable, recording: Recording) -> State:
    files: dict[str, bytes] = {}
    folders: set[str] = set()

    def walk(folder: int, path: str) -> None:
        for name, node in disk.folders.get(folder, {}).items():
            if recording.is_folder[node]:
                folders.add(path + name)
                walk(node, f"{path}{name}/")
            else:
                files[path + name] = disk.contents.get(node, b"")

    walk(ROOT, "")
    return State(cut.prefix, files, frozenset(folders), cut.allowed)
