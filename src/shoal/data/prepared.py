"""A prepared corpus on disk: tokenizer, token stores, packing plans, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from shoal.data.counts import Counts, total
from shoal.data.pack import Plan
from shoal.data.plans import packed
from shoal.data.segments import Segment, is_store, segments
from shoal.data.store import Store
from shoal.errors import DataError

SPLITS = ("train", "validation")
META = "meta.json"


@dataclass(frozen=True)
class Prepared:
    """A folder with tokenizer.json, <split>.bin and .idx, validation.txt, packing plans, and this as
    meta.json.

    fingerprint: equal for equal files and options. vocab_size: number of token ids. start_token, end_token:
    ids of the tokens that every document begins and ends with. validation_files: those kept for validation,
    with byte ranges when a single file was split. binary, empty, unreadable: files of the folders that were
    passed over. segments: of a growing store (segments.py), what had been appended when it was loaded; counted in
    `train`, though not part of <split>.bin. None of any other corpus.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    start_token: int
    end_token: int
    train: Counts
    validation: Counts
    validation_files: tuple[str, ...] = ()
    binary: int = 0
    empty: int = 0
    unreadable: int = 0
    segments: tuple[Segment, ...] | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Prepared:
        """Reads what `prepare` wrote. Raises DataError if it is missing or damaged."""
        path = Path(folder) / META
        try:
            values = msgspec.json.decode(path.read_bytes())
            found = msgspec.convert({**values, "folder": str(folder)}, cls, dec_hook=lambda kind, value: kind(value))
        except (OSError, TypeError, ValueError) as error:
            fix = "restore it from a copy, or prepare the data again (`shoal data prepare`)"
            raise DataError(f"this is no folder of prepared data: {error}", where=str(path), fix=fix) from None
        for split in SPLITS:
            store, counts = found.store(split), found.counts(split)
            if len(store.length_D) != counts.documents or len(store.tokens) != counts.tokens:
                what = f"damaged token store: {split} does not hold the {counts.documents} documents of {META}"
                fix = f"restore it from a copy, or remove {folder} and prepare again"
                raise DataError(what, where=str(folder), fix=fix)
        if not is_store(folder):
            return found
        appended = segments(found)
        return replace(found, train=total([found.train, *(one.counts for one in appended)]), segments=appended)

    @property
    def tokenizer(self) -> Path:
        """Folder of tokenizer.json and tokenizer_config.json."""
        return self.folder

    def save(self) -> None:
        values: dict[str, Any] = msgspec.to_builtins(replace(self, folder=Path()), enc_hook=str)
        del values["folder"], values["segments"]
        with (self.folder / META).open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")
            os.fsync(file.fileno())

    def counts(self, split: str) -> Counts:
        assert split in SPLITS, split
        return self.train if split == "train" else self.validation

    def store(self, split: str) -> Store:
        """The tokens of a split; of a growing store without what was appended."""
        return Store(self.folder / split)

    def prefixes(self, split: str) -> list[Path]:
        """Of the token stores that make up a split: one, and of a growing store's training text one a segment."""
        appended = self.segments if split == "train" else None
        return [self.folder / split, *(one.prefix for one in appended or ())]

    def plan(self, split: str, sequence_length: int, pack: str) -> Plan:
        """The rows of `store(split)`, made at the first call and kept in the folder if that can be written.

        Raises DataError if the training text is shorter than one sequence, unless it will grow.
        """
        self.check_length(split, sequence_length)
        return packed(self.folder / split, sequence_length, pack)

    def check_length(self, split: str, sequence_length: int) -> None:
        predictions = self.counts(split).predictions
        if split == "train" and self.segments is None and predictions < sequence_length:
            raise DataError(
                f"the text is shorter than one sequence: {predictions} tokens to train on, "
                f"data.sequence_length={sequence_length}",
                fix=f"give more text, or data.sequence_length={max(1, predictions // 2)}",
            )

    def validation_text(self) -> Iterator[bytes]:
        """The clean validation text, documents joined, in blocks; of a large corpus the first 64 MiB."""
        with (self.folder / "validation.txt").open("rb") as file:
            while block := file.read(1 << 20):
                yield block
