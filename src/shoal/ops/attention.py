"""Causal attention, over whole rows or within the documents packed into them; with dropout of its probabilities where
so asked.

A model asks `attend(layer)` for the attention function of each layer, so that packed rows, caches and rings
plug in without a change to the model. What is made here is the same function for all layers, and a compiled
block takes another micro-batch's without compiling again: masks are arguments, not constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.ops.dropout import Dropout

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BLHD, k_BSKD, v_BSKD) -> out_BLHD; H query heads share K key and value heads in turn (K divides H)."""

Attend = Callable[[int], Attention]
"""Layer index -> the attention function of that layer."""


def causal_attend() -> Attend:
    """Every position sees itself and those before it in its row."""
    return _every_layer(_causal)


def document_attend(document_BL: Tensor) -> Attend:
    """Every position sees itself and those before it in its row that have the same document number.

    document_BL: integers. Build once per micro-batch, outside a compiled function: the mask is (B, 1, L, L)
    bools, and it is left out where each row is one document.
    """
    if bool((document_BL == document_BL[:, :1]).all()):
        return causal_attend()
    return _every_layer(partial(masked, mask_BHLS=_seen(document_BL)))


def dropped_attend(document_BL: Tensor, drop: Dropout, first_head: int = 0) -> Attend:
    """As `document_attend`, with dropout of the probabilities, as in BERT (Devlin et al. 2019, arXiv:1810.04805).

    No fused kernel can make this mask, so the probabilities exist: B·H·L² of them, a few times over, in float32
    (float64 for float64). drop: of this micro-batch, its places those of whole rows. first_head: of the query heads
    that attend here, in all that the ranks hold together. Build once per micro-batch, outside a compiled function.
    """
    mask_B1LL = _seen(document_BL)
    return lambda layer: partial(_explicit, mask_BHLS=mask_B1LL, drop=drop.of_probabilities(layer, first_head))


def masked(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_BHLS: Tensor | None) -> Tensor:
    """Attention where `mask_BHLS` is True (dimensions may be 1); None = everywhere."""
    return _attention(q_BLHD, k_BSKD, v_BSKD, mask_BHLS, False)


def _seen(document_BL: Tensor) -> Tensor:
    """(B, 1, L, L) bools: which keys each query sees."""
    return (document_BL[:, :, None] == document_BL[:, None, :]).tril()[:, None]


def _every_layer(attention: Attention) -> Attend:
    return lambda layer: attention


def _causal(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
    return _attention(q_BLHD, k_BLKD, v_BLKD, None, True)


def _attention(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v (Vaswani et al. 2017, section 3.2.1; shared keys: Ainslie et al. 2023,
    "GQA")."""
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BLHD.shape[2] != k_BSKD.shape[2],
    )
    return out_BHLD.transpose(1, 2)


def _explicit(
    q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_BHLS: Tensor, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """drop(softmax(q kᵀ / sqrt(D))) v. As in fused kernels, scores and softmax are float32 at least, and the product
    with the values is made in their dtype, or autocast's if it is on."""
    kind, keys = q_BLHD.device.type, k_BSKD.shape[2]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q_BLHD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    # The query heads that share a key head are further rows of one product: no key is copied.
    q_BKGLD = q_BLHD.to(dtype).unflatten(2, (keys, -1)).permute(0, 2, 3, 1, 4)
    k_BKDS, v_BKSD = k_BSKD.to(dtype).permute(0, 2, 3, 1), v_BSKD.to(dtype).transpose(1, 2)
    with torch.autocast(kind, enabled=False):
        score_BKRS = q_BKGLD.flatten(2, 3).to(wide) @ k_BKDS.to(wide) * q_BLHD.shape[-1] ** -0.5
        score_BHLS = score_BKRS.unflatten(2, q_BKGLD.shape[2:4]).flatten(1, 2)
        p_BHLS = drop(score_BHLS.masked_fill(~mask_BHLS, -torch.inf).softmax(-1))
        out_BKRD = p_BHLS.to(dtype).unflatten(1, (keys, -1)).flatten(2, 3) @ v_BKSD
    return out_BKRD.unflatten(2, q_BKGLD.shape[2:4]).flatten(1, 2).transpose(1, 2)
