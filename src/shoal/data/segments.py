"""A growing store's segments: what was appended to it, a folder each, numbered in the order in which they came.

A growing store is a folder of prepared data that is marked by a file store.json. `shoal data append` (append.py) puts
segment-000001, segment-000002, … into it, each complete from the moment that it has its name, and never changed after:
train.bin and train.idx, tokens of the store's own tokenizer, and meta.json, what they hold. Each has packing plans of
its own, so that rows never reach over its edges: what a row holds does not depend on what comes later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shoal.data.counts import Counts
from shoal.data.store import Store
from shoal.errors import DataError

if TYPE_CHECKING:
    from shoal.data.prepared import Prepared

_MARK, _META, _NAME, _FORMAT = "store.json", "meta.json", "segment-", 1


@dataclass(frozen=True)
class Origin:
    """The options with which a growing store was begun, as the user gave them, and its fingerprint."""

    tokenizer: str
    vocab_size: int
    validation: float
    fingerprint: str
    format: int = _FORMAT


@dataclass(frozen=True)
class Segment:
    """What was appended at one time. prefix: of its token store. store: the fingerprint of the store that it is of."""

    prefix: Path
    counts: Counts
    store: str

    def save(self) -> None:
        values = {"store": self.store, "counts": self.counts}
        self.prefix.with_name(_META).write_bytes(msgspec.json.encode(values))


def is_store(folder: str | Path) -> bool:
    """Whether `shoal data append` has made this folder."""
    return (Path(folder) / _MARK).is_file()


def mark(folder: Path, origin: Origin) -> None:
    (folder / _MARK).write_bytes(msgspec.json.format(msgspec.json.encode(origin), indent=2) + b"\n")


def origin(folder: Path) -> Origin:
    """How the store in `folder` was begun. Raises DataError."""
    path = folder / _MARK
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Origin)
    except (OSError, msgspec.DecodeError) as error:
        what = f"damaged store: {error}"
        raise DataError(what, where=str(path), fix="restore this file from a copy") from None
    if found.format != _FORMAT:
        what = f"this store has format {found.format}; this shoal knows {_FORMAT}"
        raise DataError(what, where=str(path), fix="read it with the release of shoal that made it")
    return found


def folder_of(store: Path, number: int) -> Path:
    """Where a segment is, or will be; number: from 1."""
    return store / f"{_NAME}{number:06}"


def segment(store: Prepared, number: int) -> Segment | None:
    """Segment `number` of a store, None if it is not there (yet). Raises DataError if it is damaged."""
    folder = folder_of(store.folder, number)
    if not folder.exists():
        return None
    try:
        values = msgspec.json.decode((folder / _META).read_bytes())
        found = Segment(folder / "train", msgspec.convert(values["counts"], Counts), values["store"])
        held = Store(found.prefix)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _damaged(str(error), folder) from None
    except DataError as error:
        raise _damaged(f"{error.where}: {error.what}", folder) from None
    if (len(held.length_D), len(held.tokens)) != (found.counts.documents, found.counts.tokens):
        raise _damaged(f"it does not hold the {found.counts.documents} documents of {_META}", folder)
    if found.store != store.fingerprint:
        raise _damaged("it is of another store", folder)
    return found


def segments(store: Prepared) -> tuple[Segment, ...]:
    """Those that are there, up to the first that is not."""
    found: list[Segment] = []
    while (one := segment(store, len(found) + 1)) is not None:
        found.append(one)
    return tuple(found)


def next_number(store: Path) -> int:
    """That of the next segment. Raises DataError where one is missing: what is appended would take its place."""
    tails = [name.removeprefix(_NAME) for name in os.listdir(store) if name.startswith(_NAME)]
    taken = sorted(int(tail) for tail in tails if tail.isdigit())
    missing = next((number for number, one in enumerate(taken, 1) if number != one), None)
    if missing is not None:
        lost = folder_of(store, missing)
        fix = "restore it from a copy; or, if no run is to go on with this store, remove the segments after it"
        raise DataError("a segment of the store is missing", where=str(lost), fix=fix)
    return len(taken) + 1


def _damaged(what: str, folder: Path) -> DataError:
    fix = "restore this segment from a copy: runs count on its rows"
    return DataError(f"damaged segment of a store: {what}", where=str(folder), fix=fix)
