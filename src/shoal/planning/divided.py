"""How many blocks each stage of a pipeline gets (1F1B), where its ranks are not equally fast, or hold not as many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shoal.planning import closed
from shoal.planning.timeline import Seconds
from shoal.planning.work import Array

Numbers = npt.NDArray[np.int64]
# A share of a second's count that rounding may take.
_ROUNDING = 1e-9
# Ranks that blocks are taken from; divisions that are returned.
_BUSIEST, _FEW = 4, 8


def divided(blocks: int, forward: Array, backward: Array, head: Array, most: Numbers, micro_batches: int) -> Numbers:
    """Of each rank its blocks, one at least, so that all micro-batches are done as early as can be: the best few
    divisions by `closed.seconds`, (n, ranks), the best first. (0, ranks) where there are fewer blocks than ranks, or no
    memory for all.

    forward, backward: (ranks,) seconds of one block and micro-batch on each rank. head: (2,), forward and backward of
    what the last rank has beside. most: (ranks,) blocks that a rank has memory for.

    Any limit on the seconds of a micro-batch on a rank says how many blocks each can have; the fastest ranks are filled
    up first, so that the sum over ranks is as small as it can be; ranks that are as fast get as many each. Tried are
    all limits at which a number changes, and of the best one what moving single blocks mends. Without messages.
    """
    ranks = len(forward)
    both, extra = forward + backward, np.zeros(ranks)
    extra[-1] = head.sum()
    if blocks < ranks or (most < 1).any() or most.sum() < blocks:
        return np.empty((0, ranks), dtype=np.int64)
    limits = np.unique(np.arange(1, blocks + 1)[:, None] * both + extra)[:, None]
    held = np.minimum(np.floor((limits - extra) / both + _ROUNDING).astype(np.int64), most)
    held = held[(held >= 1).all(axis=1) & (held.sum(axis=1) >= blocks)]
    if not len(held):
        return np.empty((0, ranks), dtype=np.int64)
    # What does not come out even goes to the first ranks of those that are as fast, or to the last.
    tried = np.concatenate([_filled(held, both, blocks, first) for first in (True, False)])

    def seconds(found: Numbers) -> Array:
        f, b = found * forward, found * backward
        f[..., -1] += head[0]
        b[..., -1] += head[1]
        taken = closed.seconds("1f1b", ranks, 1, micro_batches, Seconds(f, b, np.zeros_like(f)))
        assert taken is not None
        return taken

    tried = np.unique(tried, axis=0)
    tried = tried[np.argsort(seconds(tried), kind="stable")[:_FEW]]
    mended = _mended(tried[0], most, both, seconds)
    return tried if (mended == tried[0]).all() else np.concatenate([mended[None], tried])


def _filled(held: Numbers, both: Array, blocks: int, first: bool) -> Numbers:
    """One block each, and what is left to the fastest ranks, then to the next, as many as they hold."""
    found = np.ones_like(held)
    left = np.full(len(held), blocks - held.shape[1])
    for speed in np.unique(both):
        ranks = np.flatnonzero(both == speed)
        more = _even(held[:, ranks] - 1, left, first)
        found[:, ranks] += more
        left -= more.sum(axis=1)
    return found


def _even(held: Numbers, left: Numbers, first: bool) -> Numbers:
    """Of each case as many for all, up to what each holds, and one more for the first (or last) that hold more."""
    left, level = np.minimum(left, held.sum(axis=1)), np.zeros_like(left)
    for more in range(1, int(held.max(initial=0)) + 1):
        level[np.minimum(held, more).sum(axis=1) <= left] = more
    found = np.minimum(held, level[:, None])
    over, rest = held > level[:, None], (left - found.sum(axis=1))[:, None]
    place = np.cumsum(over, axis=1) if first else np.cumsum(over[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(found + (over & (place <= rest)))


def _mended(found: Numbers, most: Numbers, both: Array, seconds: Callable[[Numbers], Array]) -> Numbers:
    """Moves one block from one of the busiest ranks to any other, while that is faster."""
    best = float(seconds(found[None])[0])
    while True:
        moved = [
            _moved(found, source, rank)
            for source in np.argsort(-found * both, kind="stable")[:_BUSIEST]
            for rank in range(len(found))
            if rank != source and found[source] > 1 and found[rank] < most[rank]
        ]
        if not moved:
            return found
        taken = seconds(np.stack(moved))
        if float(taken.min()) >= best * (1 - _ROUNDING):
            return found
        found, best = moved[int(np.argmin(taken))], float(taken.min())


def _moved(found: Numbers, source: int, rank: int) -> Numbers:
    other = found.copy()
    other[source] -= 1
    other[rank] += 1
    return other
