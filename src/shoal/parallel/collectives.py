"""Collectives of flat tensors, under the names that this version of PyTorch has for them.

Both work along dimension 0: (output, input, group=..., async_op=...).
"""

from __future__ import annotations

import torch.distributed as dist

# Since 2.13; the earlier names warn there.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
