"""What a tensor-parallel step makes and sends, watched below autograd: every tensor of every operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal import mesh as meshes
from shoal.ops import loss
from shoal.parallel.collectives import ALL_GATHER
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases

# Of the 144 tokens of a micro-batch; a chunk's logits have more elements than all weights of a rank together.
CHUNK, VOCABULARY = 48, 1022


class Largest(TorchDispatchMode):
    """made, sent: elements of the largest tensor that any operation, or any collective, takes or makes."""

    made = sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        size = max((t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)), default=0)
        self.made = max(self.made, size)
        if func.namespace == "c10d":
            self.sent = max(self.sent, size)
        return out


def largest(seat: meshes.Seat, gather: bool = False) -> tuple[int, int]:
    """(made, sent) while gradients are computed with tensor=2. gather: a planted bug, each chunk's logits are put
    together."""
    torch.set_num_threads(1)
    what = cases.job("tensor=2,micro_batch=6", 2, "sgd", model="even")
    what = replace(
        what,
        model=replace(what.model, vocab_size=VOCABULARY),
        train=replace(what.train, loss_chunk=CHUNK),
    ).validate()
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        parts.sync.begin(0)
        with pytest.MonkeyPatch.context() as patch, Largest() as seen:
            if gather:
                _gather_logits(patch, parts)
            parts.replica.gradients(cases.rank_batches(mesh, 0, 0), parts.objective)
        return seen.made, seen.sent
    finally:
        mesh.close()


def _gather_logits(patch: pytest.MonkeyPatch, parts: Parts) -> None:
    right = loss._Chunk.loss

    def wrong(chunk: loss._Chunk) -> Tensor:
        tensors = parts.objective.tensors
        out = right(chunk)
        assert tensors is not None
        whole_CV = chunk.tile_CW.new_empty(tensors.ranks * chunk.tile_CW.shape[0], chunk.tile_CW.shape[1])
        ALL_GATHER(whole_CV, chunk.tile_CW, group=tensors.group)
        return out

    patch.setattr(loss._Chunk, "loss", wrong)
