"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4), features paired as in Hugging Face's
Llama: feature i with feature i + D/2."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def frequencies(head_size: int, theta: float, scaling: str, device: torch.device) -> Tensor:
    """Radians per position of each pair of features, float32, (head_size / 2,).

    scaling: JSON in Hugging Face's words, "" = none. `linear` divides all by `factor` (Chen et al. 2023,
    arXiv:2306.15595); `llama3` divides only the long wavelengths, with a smooth ramp (Llama 3.1).
    Always rounded to float32, as in the models that are published.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size
    frequency = 1.0 / theta**exponent
    rope = json.loads(scaling) if scaling else {}
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":
        frequency = _llama3(frequency, rope)
    else:
        assert kind == "default", f"rope_type {kind} passed validation"
    return frequency.to(device)


def _llama3(frequency: Tensor, rope: dict[str, float]) -> Tensor:
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    kept = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequency / factor + kept * frequency


def rotation(positions_BL: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, (B, L, 1, head_size / 2); float64 for float64, else
    float32.

    positions_BL: integers, restarting at 0 in each document; B may be 1 for all rows.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions_BL[..., None, None].to(wide) * frequency.to(wide)
    return angle.cos(), angle.sin()


def rotate(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features by its angle, computed in the dtype of `cos`, rounded once to that of x."""
    first, second = x_BLHD.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x_BLHD.dtype)
