"""Batches of packed tokens, as a pure function of the position in the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.batch import Batch
from shoal.data.order import permute
from shoal.data.plans import packed
from shoal.data.prepared import Prepared
from shoal.data.rows import Rows
from shoal.data.segments import Segment, segment
from shoal.data.store import Store
from shoal.errors import DataError
from shoal.job.data import DataOptions

# Of a growing store's segments, so many are open at a time: each takes a handful of memory maps, of which a process
# has 65,530, and it is the last ones that are read.
_OPEN = 64


class Loader:
    """Reads a split of a prepared corpus.

    The data's position is one integer, the number of global samples before it. It has the same sample
    wherever a run was stopped and however many ranks read; epoch e is positions e·samples … (e + 1)·samples −
    1, and a global batch may reach from one into the next. samples: rows an epoch. tokens: predictions an
    epoch (weights that are 1).

    The rows of a growing store are those of the text that it was begun with and then of its segments. With
    `data.grow` there are no epochs, position p is row p, and `grow` looks for more: samples, tokens are what there
    is so far. Without, they are what there was when `prepared` was loaded.

    used: stretches of positions, (first, end), that a server has given to workers out of turn: `stretch` and `after`
    leave them out.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: DataOptions,
        split: str = "train",
        global_batch: int = 1,
        seed: int = 0,
    ):
        """Raises DataError if the split holds nothing, or training less than one sequence, and will not grow."""
        self.growing = split == "train" and options.grow
        if prepared.counts(split).predictions == 0 and not self.growing:
            fix = "give more text, or another data.validation"
            raise DataError(f"there is no {split} text", where=str(prepared.folder), fix=fix)
        plan = prepared.plan(split, options.sequence_length, options.pack)
        self._prepared, self._length, self._pack = prepared, options.sequence_length, options.pack
        self._base = Rows(prepared.store(split).tokens, plan, self._length, prepared.end_token)
        self._random, self._seed = options.order == "random", seed
        self.global_batch = global_batch
        self.samples, self.tokens = plan.rows, plan.predictions
        self.used: list[tuple[int, int]] = []
        self._first_S = [0]
        self._opened = lru_cache(_OPEN)(self._open)
        for one in (prepared.segments if split == "train" else None) or ():
            self._follow(one)
        self.grow()

    def grow(self) -> int:
        """Looks for text that was appended to a growing store since. Returns `samples`, the rows that there are now.

        Rows that were there stay as they were. Raises DataError if a segment is damaged.
        """
        while self.growing and (one := segment(self._prepared, len(self._first_S))) is not None:
            self._follow(one)
        return self.samples

    def _follow(self, one: Segment) -> None:
        plan = packed(one.prefix, self._length, self._pack)
        self._first_S.append(self.samples)
        self.samples += plan.rows
        self.tokens += plan.predictions

    def batch(self, position: int, part: int, parts: int) -> Batch:
        """Part `part` of `parts` equal parts of the global batch that starts at global sample `position`."""
        assert self.global_batch % parts == 0, f"{self.global_batch} samples in {parts} parts"
        size = self.global_batch // parts
        return self.stretch(self.after(position, part * size), size)

    def stretch(self, position: int, count: int) -> Batch:
        """The next `count` global samples, from `position` on."""
        position_N = np.arange(position, self.after(position, count))
        for first, end in self.used:
            position_N = position_N[(position_N < first) | (position_N >= end)]
        return self.rows(self.order(position_N))

    def skip(self, used: Iterable[tuple[int, int]]) -> None:
        """From now on leaves out these stretches of positions, no two of which overlap."""
        self.used = sorted((first, end) for first, end in used)

    def after(self, position: int, count: int) -> int:
        """Where the sample is that comes next after `count` ones from `position` on."""
        end = position + count
        for first, last in self.used:
            if first <= end and last > position:
                end += last - max(first, position)
        return end

    def order(self, position_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row at each global sample position, 0 ≤ row < samples. DataError where a growing store has none yet."""
        if self.growing:
            self._need(position_N)
            return position_N.copy()
        epoch_N, row_N = np.divmod(position_N, self.samples)
        if self._random:
            for epoch in np.unique(epoch_N).tolist():
                here = epoch_N == epoch
                row_N[here] = permute(row_N[here], self.samples, self._seed, epoch)
        return row_N

    def rows(self, row_B: NDArray[np.int64]) -> Batch:
        """The batch of these rows."""
        row_B = np.array(row_B, np.int64)
        if len(self._first_S) == 1 and not self.growing:
            return self._base.batch(row_B)
        self._need(row_B)
        segment_B = np.searchsorted(self._first_S, row_B, side="right") - 1
        numbers = np.unique(segment_B).tolist()
        if len(numbers) == 1:
            return self._opened(numbers[0]).batch(row_B)
        places = [np.flatnonzero(segment_B == number) for number in numbers]
        parts = [self._opened(number).batch(row_B[place]) for number, place in zip(numbers, places, strict=True)]
        back_B = torch.from_numpy(np.argsort(np.concatenate(places)))
        return Batch(**{f.name: torch.cat([getattr(part, f.name) for part in parts])[back_B] for f in fields(Batch)})

    def _open(self, number: int) -> Rows:
        """Of a growing store: 0 = what it was begun with, then its segments."""
        if number == 0:
            return self._base
        one = segment(self._prepared, number)
        if one is None:
            fix = "restore it from a copy: rows do not go away while a run reads them"
            raise DataError(f"segment {number} of the store is gone", where=str(self._prepared.folder), fix=fix)
        plan = packed(one.prefix, self._length, self._pack)
        return Rows(Store(one.prefix).tokens, plan, self._length, self._prepared.end_token, self._first_S[number])

    def _need(self, row_N: NDArray[np.int64]) -> None:
        if len(row_N) and row_N.max() >= self.samples:
            what = f"row {row_N.max():,} is not there: the store has {self.samples:,} rows so far"
            fix = f"append more text: shoal data append {self._prepared.folder} FILE"
            raise DataError(what, where=str(self._prepared.folder), fix=fix)
