"""Ranks that train with Muon, right or with a known way to get it wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import mesh as meshes
from shoal.optim import muon, update, whole
from shoal.optim.whole import Wholes
from shoal.training.parts import assemble
from tests.equivalence import cases


def run(seat: meshes.Seat, layout: str, steps: int, bug: str = "", at_once: int = 0, **options: Any) -> dict[str, Any]:
    """A rank's part of the job. bug: of `_planted`. at_once: numbers that a rank has whole at once, 0 = as usual."""
    torch.set_num_threads(1)
    what = cases.job(layout, steps, optimizer="muon", **{k: v for k, v in options.items() if k != "optimizer"})
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        with ExitStack() as stack:
            if at_once:
                stack.enter_context(mock.patch.object(whole, "_AT_ONCE", at_once))
            for patch in _planted(bug):
                stack.enter_context(patch)
            parts = assemble(what, mesh)
            wholes, sent = parts.update._muon._wholes, []
            stack.enter_context(mock.patch.object(whole.dist, "all_to_all_single", _counted(sent)))
            return cases.take_steps(parts, steps) | {"rounds": len(wholes.rounds), "sent": sent}
    finally:
        mesh.close()


def _counted(sent: list[int]) -> Callable[..., Any]:
    """In the place of `all_to_all_single`: notes how many numbers it is given."""
    exchange = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(given.numel())
        return exchange(output, given, *args, **options)

    return counting


def _planted(bug: str) -> Iterator[Any]:
    if bug == "what is stored as one is one matrix":
        yield mock.patch.object(Wholes, "map", _joined(r"\b([qkv]|gate|up)_proj"))
    elif bug == "all experts are one matrix":
        yield mock.patch.object(Wholes, "map", _joined(r"experts\.\d+"))
    elif bug == "each rank's piece is a matrix":
        yield mock.patch.object(Wholes, "map", lambda self, pieces, function, dtype: [function(p) for p in pieces])
    elif bug == "the output layer is a matrix of a block":
        yield mock.patch.object(update, "is_hidden", lambda shard: muon.is_hidden(shard) or "lm_head" in shard.name)
    else:
        assert not bug, bug


def _joined(pattern: str) -> Callable[..., list[Tensor]]:
    """In the place of `map`, on one rank: matrices whose names differ in this only, one below the other, are one."""

    def wrong(self: Wholes, pieces: list[Tensor], function: Callable[[Tensor], Tensor], dtype: Any) -> list[Tensor]:
        places = {place.index: place.piece.name for m in chain(*self.rounds) for place in m.places}
        groups: dict[str, list[int]] = {}
        for index in range(len(pieces)):
            groups.setdefault(re.sub(pattern, "", places[index]), []).append(index)
        made: dict[int, Tensor] = {}
        for group in groups.values():
            together = function(torch.cat([pieces[i] for i in group]))
            made |= dict(zip(group, together.split([len(pieces[i]) for i in group]), strict=True))
        return [made[index] for index in range(len(pieces))]

    return wrong
