"""The dense feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions
from shoal.models.storage import FusedLinear


class FeedForward(nn.Module):
    """Gated with SiLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, options: ModelOptions, size: int = 0):
        """size: its width in features, 0 = intermediate_size."""
        super().__init__()
        size = size or options.intermediate_size
        outputs = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = FusedLinear(options.hidden_size, outputs, options.mlp_bias)
        self.down_proj = nn.Linear(size, options.hidden_size, bias=options.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up_proj(x_BLD)
        return self.down_proj(F.silu(gate_BLF) * up_BLF)
