"""Context parallelism: which positions of every row a rank holds, and attention over rows that no rank holds whole."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.ops.attention import Attend
from shoal.parallel import ring
from shoal.parallel.ring import Ring
from shoal.parallel.ulysses import Ulysses

METHODS = ("ring", "ulysses")


class Context:
    """The ranks of one group, each with L/n positions of every row. All of them make it together.

    ring: head and tail (`shoal.parallel.ring`). ulysses: one piece each: the all-to-all puts rows together from pieces
    in order, and needs no balance.
    """

    def __init__(self, group: dist.ProcessGroup, method: str):
        assert method in METHODS, method
        self.group, self.method = group, method
        self.ranks, self.rank = group.size(), group.rank()
        # A group's first messages on NCCL must involve all of its ranks, and those of a ring may not.
        dist.barrier(group)

    def places(self, length: int) -> Tensor:
        """int64 (L/n,): the positions of a row that this rank holds, in its order."""
        whole = self.method == "ulysses"
        pieces = self.ranks if whole else 2 * self.ranks
        assert length % pieces == 0, f"{length} positions in {pieces} pieces"
        mine = [self.rank] if whole else list(ring.chunks(self.rank, self.ranks))
        return torch.arange(length).view(pieces, -1)[mine].flatten()

    def cut(self, x_BL: Tensor, dim: int = 1) -> Tensor:
        """What this rank holds of a tensor with whole rows along `dim`."""
        return x_BL.index_select(dim, self.places(x_BL.shape[dim]).to(x_BL.device))

    def attend(self, document_BL: Tensor) -> Attend:
        """Every position sees itself and those before it in its row that have the same document number.

        document_BL: integers, of the WHOLE rows and the same on every rank, so no mask travels. Build once per
        micro-batch, outside a compiled function. The attention functions take and give this rank's positions; all ranks
        call them in the same order, and so their backward passes.
        """
        spread = Ring(self.group, document_BL) if self.method == "ring" else Ulysses(self.group, document_BL)
        attention = partial(_attention, spread)
        return lambda layer: attention


@torch.compiler.disable
def _attention(spread: Ring | Ulysses, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """In autocast's dtype if it is on, as `scaled_dot_product_attention`."""
    kind = q_BTHD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q_BTHD.dtype
    return spread(q_BTHD.to(dtype), k_BTKD.to(dtype), v_BTKD.to(dtype))
