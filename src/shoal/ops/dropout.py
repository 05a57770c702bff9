"""Dropout whose mask is a hash of what an element is, not of who computes it or when.

An element is named by (seed, step, sample, position, layer, site, global feature); a probability of attention, by
(seed, step, sample, position of the query, layer, its site, global head, position of the key). Any rank that holds it
comes to the same answer, so masks do not depend on the layout; backward and recomputation make the mask again, so
none is kept. `shoal.ops.counter` has the hash.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoal.ops.counter import draw, hashes

LayerDropout = Callable[..., Tensor]
"""(x_BLD, site, first_feature=0) -> x_BLD."""

# The site of attention's probabilities; models count theirs from 0.
_PROBABILITIES = -1

_TO_SIGNED = 1 << 31


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
            state_B = draw(state_B, part)
        self.row_BL = draw(state_B[:, None], place.long())

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
        return partial(_drop, layer_BL=draw(self.row_BL, layer), dropped=self.dropped)

    def of_probabilities(self, layer: int, first_head: int = 0) -> Callable[[Tensor], Tensor]:
        """p_BHLS -> p_BHLS, for the probabilities with which the queries at this micro-batch's places look at keys.

        Keys are those of positions 0 to S - 1 of the row. first_head: of the H heads here, which are neighbours, in all
        that the ranks hold together. For compiled blocks as `at`.
        """
        site_BL = draw(draw(self.row_BL, layer), _PROBABILITIES)
        # In a tensor, whose value a compiler does not see: with it known, Inductor makes integers that fit nowhere.
        first = torch.full((), first_head, dtype=torch.int64, device=site_BL.device)
        return partial(_drop_probabilities, site_BL=site_BL, first_head=first, dropped=self.dropped)


def keep_all(x_BLD: Tensor, site: int, first_feature: int = 0) -> Tensor:
    """No dropout."""
    return x_BLD


def _drop(x_BLD: Tensor, site: int, first_feature: int = 0, *, layer_BL: Tensor, dropped: int) -> Tensor:
    assert layer_BL.shape == x_BLD.shape[:2], f"rows {tuple(layer_BL.shape)} for x {tuple(x_BLD.shape)}"
    return _Drop.apply(x_BLD, draw(layer_BL, site), first_feature, dropped)


def _drop_probabilities(p_BHLS: Tensor, *, site_BL: Tensor, first_head: Tensor, dropped: int) -> Tensor:
    heads, queries = p_BHLS.shape[1:3]
    assert site_BL.shape == (len(p_BHLS), queries), f"rows {tuple(site_BL.shape)} for p {tuple(p_BHLS.shape)}"
    head_H1 = first_head + torch.arange(heads, device=p_BHLS.device)[:, None]
    return _Drop.apply(p_BHLS, draw(site_BL[:, None].expand(-1, heads, -1), head_H1), 0, dropped)


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
    hash_BLD = hashes(key_BL, first_feature, x_BLD.shape[-1])
    return torch.where(hash_BLD >= dropped - _TO_SIGNED, x_BLD * (2**32 / (2**32 - dropped)), 0)
