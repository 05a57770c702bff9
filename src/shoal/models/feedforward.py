"""The dense feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions


class FeedForward(nn.Module):
    """Gated with SiLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, options: ModelOptions, size: int = 0):
        """size: its width in features, 0 = intermediate_size."""
        super().__init__()
        size = size or options.intermediate_size
        self.gate_proj = nn.Linear(options.hidden_size, size, bias=options.mlp_bias)
        self.up_proj = nn.Linear(options.hidden_size, size, bias=options.mlp_bias)
        self.down_proj = nn.Linear(size, options.hidden_size, bias=options.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
