"""Dropout whose mask is a hash of what an element is, not of who computes it or when.

An element is named by (seed, step, sample, position, layer, site, global feature); a probability of attention, by
(seed, step, sample, position of the query, layer, its site, global head, position of the key). Any rank that holds it
comes to the same answer, so masks do not depend on the layout; backward and recomputation make the mask again, so
none is kept.

A row's 64 bits come from a chain of SplitMix64 outputs (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators"; constants as in Vigna's splitmix64.c): what is drawn from one state is the state for the next
part of the name. Its two halves then key a 32-bit mixer over the features, the one before the first and the
other before the second multiplication; with the second half 0 this is `lowbias32` (Wellons 2018, "Prospecting
for hash functions", nullprogram.com/blog/2018/07/31). Counter-based randomness: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3". Signed integers wrap here as unsigned ones do in the papers: torch has no shift,
addition or comparison for uint32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

LayerDropout = Callable[..., Tensor]
"""(x_BLD, site, first_feature=0) -> x_BLD."""

# The site of attention's probabilities; models count theirs from 0.
_PROBABILITIES = -1

_TO_SIGNED = 1 << 31
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_64 = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_MIX_32 = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))


class Dropout:
    """Dropout of one micro-batch, on the rows that this rank holds of it.

    An element is dropped with probability p, which is rate rounded to a multiple of 2⁻³² (but less than 1):
    where its hash, a signed number of 32 bits, is less than p·2³² − 2³¹. Else it is scaled by 1 / (1 − p).
    Where p = 0, x itself comes back.
    """

    def __init__(self, rate: float, seed: int, step: int, sample_B: Tensor, place: Tensor):
        """sample_B: int64. place: global positions in the row, (L,) or (B, L), integers; both on x's device.

        rate: in [0, 1). Make it outside a compiled function, once per micro-batch.
        """
        assert 0 <= rate < 1, f"dropout of {rate}"
        assert sample_B.dtype == torch.int64, "sample numbers must not wrap"
        self.dropped = min(round(rate * 2**32), 2**32 - 1)
        state_B = torch.zeros_like(sample_B)
        for part in (seed, step, sample_B):
            state_B = _draw(state_B, part)
        self.row_BL = _draw(state_B[:, None], place.long())

    def __call__(self, x_BLD: Tensor, layer: int, site: int, first_feature: int = 0) -> Tensor:
        """x with some elements 0 and the others scaled: float64, float32, bfloat16 or float16, and stays so.

        layer, site: any integers; together they name a place in the model where dropout happens.
        first_feature: of x's features, which are neighbours, in all that the ranks hold together.
        """
        return self.at(layer)(x_BLD, site, first_feature)

    def at(self, layer: int) -> LayerDropout:
        """The same as a function for one layer. Blocks that are compiled must be given this, made outside:

        the layer's number is then in a tensor, and one compilation serves all layers and micro-batches.
        """
        if not self.dropped:
            return keep_all
        return partial(_drop, layer_BL=_draw(self.row_BL, layer), dropped=self.dropped)

    def of_probabilities(self, layer: int, first_head: int = 0) -> Callable[[Tensor], Tensor]:
        """p_BHLS -> p_BHLS, for the probabilities with which the queries at this micro-batch's places look at keys.

        Keys are those of positions 0 to S - 1 of the row. first_head: of the H heads here, which are neighbours, in all
        that the ranks hold together. For compiled blocks as `at`.
        """
        site_BL = _draw(_draw(self.row_BL, layer), _PROBABILITIES)
        # In a tensor, whose value a compiler does not see: with it known, Inductor makes integers that fit nowhere.
        first = torch.full((), first_head, dtype=torch.int64, device=site_BL.device)
        return partial(_drop_probabilities, site_BL=site_BL, first_head=first, dropped=self.dropped)


def keep_all(x_BLD: Tensor, site: int, first_feature: int = 0) -> Tensor:
    """No dropout."""
    return x_BLD


def _drop(x_BLD: Tensor, site: int, first_feature: int = 0, *, layer_BL: Tensor, dropped: int) -> Tensor:
    assert layer_BL.shape == x_BLD.shape[:2], f"rows {tuple(layer_BL.shape)} for x {tuple(x_BLD.shape)}"
    return _Drop.apply(x_BLD, _draw(layer_BL, site), first_feature, dropped)


def _drop_probabilities(p_BHLS: Tensor, *, site_BL: Tensor, first_head: Tensor, dropped: int) -> Tensor:
    heads, queries = p_BHLS.shape[1:3]
    assert site_BL.shape == (len(p_BHLS), queries), f"rows {tuple(site_BL.shape)} for p {tuple(p_BHLS.shape)}"
    head_H1 = first_head + torch.arange(heads, device=p_BHLS.device)[:, None]
    return _Drop.apply(p_BHLS, _draw(site_BL[:, None].expand(-1, heads, -1), head_H1), 0, dropped)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, key_BL: Tensor, first_feature: int, dropped: int) -> Tensor:
        ctx.save_for_backward(key_BL)
        ctx.first_feature, ctx.dropped = first_feature, dropped
        return _masked(x_BLD, key_BL, first_feature, dropped)

    @staticmethod
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor | None, ...]:
        (key_BL,) = ctx.saved_tensors
        return _masked(gradient_BLD, key_BL, ctx.first_feature, ctx.dropped), None, None, None


def _masked(x_BLD: Tensor, key_BL: Tensor, first_feature: int, dropped: int) -> Tensor:
    hash_BLD = _hash(key_BL, first_feature, x_BLD.shape[-1])
    return torch.where(hash_BLD >= dropped - _TO_SIGNED, x_BLD * (2**32 / (2**32 - dropped)), 0)


def _draw(state: Tensor, number: int | Tensor) -> Tensor:
    """Output `number`, counted from 0, of the SplitMix64 generator in that state (int64, broadcast)."""
    x = state + (torch.zeros_like(state) + number + 1) * _GOLDEN
    for shift, factor in _MIX_64:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _hash(key_BL: Tensor, first_feature: int, features: int) -> Tensor:
    """int32, uniform from −2³¹ to 2³¹ − 1."""
    first_BL1, second_BL1 = key_BL[..., None].int(), (key_BL[..., None] >> 32).int()
    feature_D = torch.arange(first_feature, first_feature + features, dtype=torch.int32, device=key_BL.device)
    (shift, factor), (shift_2, factor_2) = _MIX_32
    # In place, for where nothing is compiled: 26 ms in place of 43 for 1024 × 2048, on one core.
    x_BLD = first_BL1 ^ feature_D
    x_BLD.bitwise_xor_(_shifted(x_BLD, shift)).mul_(factor)
    x_BLD.bitwise_xor_(_shifted(x_BLD, shift_2)).add_(second_BL1).mul_(factor_2)
    return x_BLD.bitwise_xor_(_shifted(x_BLD, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift of signed integers repeats the sign."""
    return (x >> bits).bitwise_and_((1 << x.dtype.itemsize * 8 - bits) - 1)
