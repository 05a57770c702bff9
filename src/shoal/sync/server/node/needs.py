"""What one rank of a worker needs of the embedding for what it was granted: the rows of its samples' tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from shoal.sync.server.messages import Piece, Range, Rows
from shoal.sync.server.rows import rows_wanted

EMBEDDING = "model.embed_tokens.weight"

Words = Callable[[Range], NDArray[np.int64] | None]
"""Samples -> the rows of the embedding that all of the worker's ranks together read while they compute on these; None
where they read others too, or cannot know. Called on the thread that talks to the servers."""


class Needs:
    """Until `filled` is set, after the first pull, memory holds nothing, and everything is needed."""

    def __init__(self, wanted: Mapping[int, tuple[Piece, ...]], words: Words, itemsize: int):
        """wanted: the rank's pieces on each shard. itemsize: bytes of a number, as it travels."""
        self._wanted, self._words, self._itemsize = wanted, words, itemsize
        self.has_rows = any(piece.name == EMBEDDING for pieces in wanted.values() for piece in pieces)
        self.filled = False

    def of(self, samples: Range) -> dict[int, tuple[Rows, ...]] | None:
        """Of each shard, the pieces of which rows are enough; None where everything is needed."""
        row_N = self._words(samples) if self.filled else None
        if row_N is None:
            return None
        return {n: rows_wanted(pieces, EMBEDDING, row_N, self._itemsize) for n, pieces in self._wanted.items()}
