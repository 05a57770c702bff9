"""A prepared corpus on disk: tokenizer, token stores, packing plans, and what is in them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.data.pack import Plan, plan
from shoal.data.store import Store
from shoal.errors import DataError

SPLITS = ("train", "validation")
_META = "meta.json"


@dataclass(frozen=True)
class Counts:
    """What a split holds. bytes: of its clean text in UTF-8. replaced: invalid byte sequences that are U+FFFD
    now.
    """

    files: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    replaced: int = 0

    @property
    def predictions(self) -> int:
        """Tokens that are predicted, and weigh in the loss, once an epoch: all but the first of each
        document.
        """
        return self.tokens - self.documents


@dataclass(frozen=True)
class Prepared:
    """A folder with tokenizer.json, <split>.bin and .idx, validation.txt, packing plans, and this as
    meta.json.

    fingerprint: equal for equal files and options. vocab_size: number of token ids. start_token, end_token:
    ids of the tokens that every document begins and ends with. validation_files: those kept for validation,
    with byte ranges when a single file was split. binary, empty, unreadable: files of the folders that were
    passed over.
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

    @classmethod
    def load(cls, folder: str | Path) -> Prepared:
        """Reads what `prepare` wrote. Raises DataError if it is missing or damaged."""
        path = Path(folder) / _META
        try:
            values = msgspec.json.decode(path.read_bytes())
            found = msgspec.convert({**values, "folder": str(folder)}, cls, dec_hook=lambda kind, value: kind(value))
        except (OSError, TypeError, ValueError) as error:
            fix = "prepare the data again (`shoal data prepare`)"
            raise DataError(f"this is no folder of prepared data: {error}", where=str(path), fix=fix) from None
        for split in SPLITS:
            store, counts = found.store(split), found.counts(split)
            if len(store.length_D) != counts.documents or len(store.tokens) != counts.tokens:
                what = f"damaged token store: {split} does not hold the {counts.documents} documents of {_META}"
                raise DataError(what, where=str(folder), fix=f"remove {folder} and prepare again")
        return found

    @property
    def tokenizer(self) -> Path:
        """Folder of tokenizer.json and tokenizer_config.json."""
        return self.folder

    def save(self) -> None:
        values: dict[str, Any] = msgspec.to_builtins(replace(self, folder=Path()), enc_hook=str)
        del values["folder"]
        with (self.folder / _META).open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")
            os.fsync(file.fileno())

    def counts(self, split: str) -> Counts:
        assert split in SPLITS, split
        return self.train if split == "train" else self.validation

    def store(self, split: str) -> Store:
        return Store(self.folder / split)

    def plan(self, split: str, sequence_length: int, pack: str) -> Plan:
        """The rows of a split, made at the first call and kept in the folder if that can be written.

        Raises DataError if the training text is shorter than one sequence.
        """
        self.check_length(split, sequence_length)
        folder = self.folder / f"plan-{split}-{sequence_length}-{pack}"
        if kept := _kept(folder):
            return kept
        shutil.rmtree(folder, ignore_errors=True)  # if it is there, it is damaged
        store = self.store(split)
        made = plan(store.start_D, store.length_D, sequence_length, pack)
        _publish(made, folder)
        return _kept(folder) or made

    def check_length(self, split: str, sequence_length: int) -> None:
        predictions = self.counts(split).predictions
        if split == "train" and predictions < sequence_length:
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


def _kept(folder: Path) -> Plan | None:
    """The plan in a folder, memory-mapped; None if there is none or it is damaged."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("start", "length", "first")]
    except (OSError, ValueError, EOFError):
        return None
    start_P, length_P, first_R = map(np.asarray, arrays)
    return Plan(start_P, length_P, first_R) if len(start_P) == len(length_P) == first_R[-1] else None


def _publish(made: Plan, folder: Path) -> None:
    """Writes a plan under another name first; of several ranks that do so at once the first one counts."""
    try:
        draft = Path(tempfile.mkdtemp(prefix=".plan-", dir=folder.parent))
    except OSError:
        return
    try:
        np.save(draft / "start.npy", made.start_P)
        np.save(draft / "length.npy", made.length_P)
        np.save(draft / "first.npy", made.first_R)
        draft.rename(folder)
    except OSError:
        pass  # somebody was first, or the disk is full: the plan in memory will do
    finally:
        shutil.rmtree(draft, ignore_errors=True)
