"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4), features paired as in Hugging Face's
Llama: feature i with feature i + D/2."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache
def frequencies(head_size: int, theta: float, scaling: str, device: torch.device) -> Tensor:
    """Radians per position of each pair of features, float32, (head_size / 2,).

    scaling: JSON in Hugging Face's words, "" = none. `linear` divides all by `factor` (Chen et al. 2023,
    arXiv:2306.15595); `llama3` divides only the long wavelengths, with a smooth ramp (Llama 3.1); so does `yarn`, with
    another ramp (Peng et al. 2023, "YaRN", section 3.2, arXiv:2309.00071). Always rounded to float32, as in the models
    that are published.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size
    frequency = 1.0 / theta**exponent
    rope = _parsed(scaling)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":
        frequency = _llama3(frequency, rope)
    elif kind == "yarn":
        kept = _kept_by_yarn(head_size, theta, rope)
        frequency = (1 - kept) * (1.0 / (rope["factor"] * theta**exponent)) + kept * frequency
    else:
        assert kind == "default", f"rope_type {kind} passed validation"
    return frequency.to(device)


def _llama3(frequency: Tensor, rope: dict[str, float]) -> Tensor:
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    kept = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequency / factor + kept * frequency


def _kept_by_yarn(head_size: int, theta: float, rope: dict[str, Any]) -> Tensor:
    """Of each pair of features the part of its frequency that is not divided: 1 for those that turn `beta_fast` times
    or more often in the original context, 0 for those that turn `beta_slow` times or less."""

    def pair(turns: float) -> float:
        context = rope["original_max_position_embeddings"]
        return head_size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(rope.get("beta_fast", 32)), pair(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(head_size // 2, dtype=torch.float32, device="cpu") - first) / (last - first)
    return 1 - ramp.clamp(0.0, 1.0)


@lru_cache
def attention_factor(scaling: str) -> float:
    """What rotated features are multiplied by: with `yarn` its temperature (section 3.4), in DeepSeek's models the
    quotient of two of them; else 1."""
    rope = _parsed(scaling)
    if rope.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _temperature(rope["factor"], rope["mscale"]) / _temperature(rope["factor"], rope["mscale_all_dim"])
    return _temperature(rope["factor"])


@lru_cache
def latent_factor(scaling: str) -> float:
    """What scores of latent attention are multiplied by besides, of features without position too: the square of
    `yarn`'s temperature with `mscale_all_dim`, where that is given (DeepSeek-V3's published model code)."""
    rope = _parsed(scaling)
    if rope.get("rope_type") != "yarn" or not rope.get("mscale_all_dim"):
        return 1.0
    return _temperature(rope["factor"], rope["mscale_all_dim"]) ** 2


def _temperature(factor: float, weight: float = 1.0) -> float:
    """sqrt(1/t) of YaRN, equation 22."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _parsed(scaling: str) -> dict[str, Any]:
    rope: dict[str, Any] = json.loads(scaling) if scaling else {}
    return rope


def rotation(positions_BL: Tensor, frequency: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles times `factor`, (B, L, 1, head_size / 2); float64 for float64, else
    float32.

    positions_BL: integers, restarting at 0 in each document; B may be 1 for all rows.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions_BL[..., None, None].to(wide) * frequency.to(wide)
    return (angle.cos(), angle.sin()) if factor == 1.0 else (angle.cos() * factor, angle.sin() * factor)


def rotate(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features by its angle, computed in the dtype of `cos`, rounded once to that of x."""
    first, second = x_BLHD.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x_BLHD.dtype)
