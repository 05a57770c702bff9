"""Clean text -> tokens in a store, by several threads, in an order that does not depend on how many.

Threads, since the tokenizer works outside Python's lock: making arrays of its tokens is all that is serial, a
few percent of the time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.data.store import Writer
from shoal.data.text import Piece, Texts, read
from shoal.data.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Encoded:
    """Tokens of a piece of text, start and end tokens at the edges of its documents included."""

    piece: Piece
    text: bytes
    replaced: int
    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass
class Tally:
    """What went into a store. bytes: of the clean text in UTF-8. replaced: invalid sequences, now U+FFFD."""

    bytes: int = 0
    replaced: int = 0


def encode(
    pieces: Iterable[Piece],
    text_field: str,
    tokenizer: Tokenizer,
    writer: Writer,
    workers: int,
    copy: BinaryIO | None,
    copied: int,
    progress: Callable[[int], None],
) -> Tally:
    """Writes the documents of `pieces` as start token, text, end token; their text into `copy`, up to
    `copied` bytes.

    So a text can be begun from the start token alone, and its end is predicted. progress: is told the bytes
    read.
    """
    tally = Tally()

    def work(piece: Piece) -> Encoded:
        return _encode(piece, read(piece, text_field), tokenizer)

    for done in in_order(work, pieces, workers or os.cpu_count() or 1):
        writer.add(done.tokens, done.lengths, done.piece.closes)
        if copy is not None and tally.bytes < copied:
            copy.write(done.text[: copied - tally.bytes])
        tally.bytes += len(done.text)
        tally.replaced += done.replaced
        progress(done.piece.stop - done.piece.start)
    return tally


def _encode(piece: Piece, texts: Texts, tokenizer: Tokenizer) -> Encoded:
    start = [tokenizer.start] if piece.opens else []
    end = [tokenizer.end] if piece.closes else []
    encoded = tokenizer.encode(texts.documents)
    documents = [np.array(start + tokens + end, np.int64) for tokens in encoded]
    text = "".join(texts.documents).encode()
    tokens = np.concatenate(documents) if documents else np.empty(0, np.int64)
    return Encoded(piece, text, texts.replaced, tokens, np.array([len(d) for d in documents], np.int64))


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Results in the order of the items, at most 2 × workers of them begun and not yet taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
