"""Root-mean-square normalisation (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension, statistics in float32 (float64 for float64).

    x_D: (..., D). weight_D: (D,), any float dtype. dtype: of the result, default that of x. Rounds where
    Hugging Face's Llama rounds: to x's dtype before the multiplication by the weight.
    """
    wide_D = x_D if x_D.dtype == torch.float64 else x_D.float()
    wide_D = wide_D * torch.rsqrt(wide_D.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_D * wide_D.to(x_D.dtype)).to(dtype or x_D.dtype)
