"""Which dtypes a precision means: of the stored weights and of matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def stored(precision: str) -> torch.dtype:
    """Of master weights, gradients' sums and optimizer state."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute(precision: str) -> torch.dtype | None:
    """Of matrix products, where it is not the stored one."""
    return torch.bfloat16 if precision == "bf16" else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass (Micikevicius et al. 2018, "Mixed Precision Training"; bf16 needs no scale)."""
    dtype = compute(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
