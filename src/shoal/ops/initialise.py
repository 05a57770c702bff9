"""First weights that depend on seed, name and place in the tensor, and on nothing else.

A tensor is tiled into blocks, and each block has its own generator keyed by (seed, name, block). A rank makes
only the blocks that its shard touches, so every layout starts from the same weights, whichever way it cuts
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from shoal.ops.fill import Fill

# Edges of a block over the last two dimensions (1 over those before): small enough that a cut along either
# makes little that it does not keep, large enough that seeding a generator does not count.
_EDGE = 128
_EDGE_1D = _EDGE * _EDGE


@torch.no_grad()
def initialise_(
    local: Tensor, name: str, global_shape: Sequence[int], offsets: Sequence[int], fill: Fill, seed: int
) -> Tensor:
    """Fills in place the piece of a tensor of `global_shape` that starts at `offsets`; returns it.

    local: any float dtype and device, any shape that lies inside, also empty. Values are drawn in float64 and
    rounded once, so float32 and float64 start from the same weights. Philox counters (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"); torch's own generators are neither read nor moved.
    """
    assert len(global_shape) == len(offsets) == local.ndim, f"{name}: shapes of different length"
    assert all(o + n <= g for o, n, g in zip(offsets, local.shape, global_shape, strict=True)), f"{name}: outside"
    if fill.std == 0.0 or local.numel() == 0:
        return local.fill_(fill.mean)
    edges = _edges(local.ndim)
    touched = [
        range(start // edge, -(-(start + size) // edge))
        for start, size, edge in zip(offsets, local.shape, edges, strict=True)
    ]
    for block in product(*touched):
        start = [index * edge for index, edge in zip(block, edges, strict=True)]
        low = [max(s, o) for s, o in zip(start, offsets, strict=True)]
        high = [min(s + edge, o + size) for s, edge, o, size in zip(start, edges, offsets, local.shape, strict=True)]
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        place = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))
        values = _block(seed, name, block).standard_normal(edges)[inside]
        local[place] = torch.from_numpy(fill.mean + fill.std * values).to(local.device, local.dtype)
    return local


def _edges(dimensions: int) -> tuple[int, ...]:
    if dimensions < 2:
        return (_EDGE_1D,) * dimensions
    return (1,) * (dimensions - 2) + (_EDGE, _EDGE)


def _block(seed: int, name: str, block: tuple[int, ...]) -> np.random.Generator:
    key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
