"""What ranks do for the tests of generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.parallel import tensor
from shoal.serving.cache import Cache
from shoal.serving.source import find
from shoal.serving.staged import Spread


def logits(seat: meshes.Seat, folder: str, layout: str, pieces: list[list[int]], bug: str = "") -> dict[str, Any]:
    """This rank's logits in float64 after each piece of a text, if it has any; how many numbers it holds of each
    tensor, and in the cache."""
    torch.set_num_threads(1)
    mesh = meshes.build(Layout.parse(layout), seat, timeout=60)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if bug:
                BUGS[bug](patch)
            model = Spread(find(folder), mesh, torch.float64)
            cache = model.cache(sum(map(len, pieces)))
            made = [model.logits(torch.tensor([piece]), cache) for piece in pieces]
    finally:
        mesh.close()
    held: dict[str, int] = {}
    for shard in model.shards():
        held[shard.name] = held.get(shard.name, 0) + shard.local.numel()
    cached = cache.keys_NBSKD.numel() + cache.values_NBSKV.numel()
    return {"logits": [m[0].tolist() for m in made if m is not None], "held": held, "cached": cached}


def _unsummed(patch: pytest.MonkeyPatch) -> None:
    """Each rank goes on with what it made of its own features."""
    patch.setattr(tensor, "sum_whole", lambda x, group: x)


def _one_cache(patch: pytest.MonkeyPatch) -> None:
    """The first of a rank's blocks lends its keys to the others."""
    attend = Cache.attend
    patch.setattr(Cache, "attend", lambda cache, layer: attend(cache, cache.layers[0]))


BUGS = {"unsummed": _unsummed, "one cache": _one_cache}
