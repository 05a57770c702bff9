"""Tokens on disk in Megatron-Core's format: `.bin`, all tokens; `.idx`, where each document starts.

The index (megatron/core/datasets/indexed_dataset.py, `_IndexWriter`), little-endian without padding:
    9 bytes  b"MMIDIDX\\x00\\x00"     8 bytes  version, 1     1 byte  code of the tokens' dtype
    8 bytes  number of sequences S    8 bytes  number of document indices, D + 1
    S × int32  tokens of each sequence          S × int64  byte at which each starts in .bin
    (D + 1) × int64  the first sequence of each document, then S
Here a sequence is a whole document: D = S.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEAD = struct.Struct("<9sQBQQ")
_KINDS = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16)
_CODES: dict[int, type[np.generic]] = dict(enumerate(_KINDS, start=1))
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> type[np.generic]:
    """As Megatron-Core chooses it."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Writer:
    """Appends documents to `prefix`.bin; `close` writes `prefix`.idx. Memory stays the same."""

    def __init__(self, prefix: Path, vocab_size: int):
        self._prefix, self._dtype = prefix, token_dtype(vocab_size)
        self._tokens = prefix.with_suffix(".bin").open("wb")
        self._lengths = prefix.with_suffix(".lengths").open("wb+")
        self._begun = 0
        self.documents = self.tokens = 0

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], complete: bool) -> None:
        """Tokens of documents of these lengths; the first goes on with the one that was left incomplete."""
        tokens.astype(self._dtype).tofile(self._tokens)
        lengths = lengths.copy()
        if len(lengths):
            lengths[0] += self._begun
            self._begun = 0
        if not complete:
            self._begun, lengths = int(lengths[-1]), lengths[:-1]
        lengths.astype("<i4").tofile(self._lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def close(self) -> None:
        assert self._begun == 0, "the last document is open"
        code = next(code for code, dtype in _CODES.items() if dtype is self._dtype)
        with self._prefix.with_suffix(".idx").open("wb") as index:
            index.write(_HEAD.pack(_MAGIC, _VERSION, code, self.documents, self.documents + 1))
            for lengths in self._blocks():
                lengths.tofile(index)
            start = 0
            for lengths in self._blocks():
                ends = start + np.cumsum(lengths, dtype=np.int64) * np.dtype(self._dtype).itemsize
                np.concatenate(([start], ends[:-1])).astype("<i8").tofile(index)
                start = int(ends[-1])
            for first in range(0, self.documents + 1, _BLOCK):
                np.arange(first, min(first + _BLOCK, self.documents + 1), dtype="<i8").tofile(index)
            index.flush()
            os.fsync(index.fileno())
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        self.abandon()

    def _blocks(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while len(lengths := np.fromfile(self._lengths, "<i4", _BLOCK)):
            yield lengths

    def abandon(self) -> None:
        """Closes what is open, without an index."""
        self._tokens.close()
        self._lengths.close()
        self._prefix.with_suffix(".lengths").unlink(missing_ok=True)


class Store:
    """Reads a token store: memory-mapped, nothing is loaded until it is used.

    tokens: all of them, in one array. length_D, start_D: tokens of each document, and where it starts in
    `tokens`.
    """

    def __init__(self, prefix: Path):
        """Raises DataError if the two files are missing or do not fit each other."""
        bin_path, idx_path = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise _damaged("the file is missing", path)
        size = idx_path.stat().st_size
        with idx_path.open("rb") as file:
            head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise _damaged("this is not the index of a token store", idx_path)
        _, version, code, sequences, documents = _HEAD.unpack(head)
        if version != _VERSION or code not in _CODES:
            raise _damaged(f"version {version}, dtype code {code} is unknown", idx_path)
        if size != _HEAD.size + 12 * sequences + 8 * documents:
            raise _damaged(f"{size} bytes do not hold {sequences} documents", idx_path)
        raw = _map(idx_path, np.dtype(np.uint8))[_HEAD.size :]
        self.length_D: NDArray[np.int32] = raw[: 4 * sequences].view("<i4")
        pointer_D = raw[4 * sequences : 12 * sequences].view("<i8")
        first_D = raw[12 * sequences :].view("<i8")
        dtype = np.dtype(_CODES[code])
        end_D = np.cumsum(self.length_D, dtype=np.int64)
        self.start_D: NDArray[np.int64] = end_D - self.length_D
        total = int(end_D[-1]) if sequences else 0
        whole = documents == sequences + 1 and np.array_equal(first_D, np.arange(sequences + 1))
        if not whole or (self.length_D < 0).any() or not np.array_equal(pointer_D, self.start_D * dtype.itemsize):
            raise _damaged("the lengths and places of the documents do not fit each other", idx_path)
        if bin_path.stat().st_size != total * dtype.itemsize:
            what = f"it has {bin_path.stat().st_size} bytes, its index tells of {total * dtype.itemsize}"
            raise _damaged(what, bin_path)
        self.tokens: NDArray[np.integer] = _map(bin_path, dtype)


def _map(path: Path, dtype: np.dtype) -> NDArray:
    # A plain array, since slices of a np.memmap are slow. An empty file cannot be mapped.
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _damaged(what: str, path: Path) -> DataError:
    fix = f"restore it from a copy, or remove {path.parent} and prepare again"
    return DataError(f"damaged token store: {what}", where=str(path), fix=fix)
